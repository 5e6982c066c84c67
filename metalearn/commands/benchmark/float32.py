"""How far meta-gradients in float32 are from float64, beside those of a plain loop over tasks.

    distance = |g32 - g64| / |g64|        of the whole gradient as one vector, at the same parameters and tasks, cast up

Of conv4 at its initial weights, as it is and with biases in its convolutions, which ``vmap`` then takes layer by layer,
as it does a user's own model. Medians over seeds: an input of ReLU that lies within rounding of its kink may fall on
either side of it, in plain torch as well, and such a draw is percents away.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

from metalearn.commands.benchmark.contenders import BY_HAND, build_methods, order_name
from metalearn.commands.benchmark.settings import FLOAT32_SETTINGS, MetaStepSpec
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core import serialization as files
from metalearn.core.functional import relative_error
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.data.sampler import TaskShape
from metalearn.data.splits import ImageSplits
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines import by_hand
from metalearn.models import Conv4
from metalearn.training.experiment import resolve_device
from metalearn.training.runtime.precision import precision_context
from metalearn.training.tasks import load_data
from metalearn.training.tracking.console import print_path, print_table, progress_bar

_FAR = 1e-3
_NETWORKS = [(pool, biases) for pool in ("stride", "max") for biases in (False, True)]


@dataclass(frozen=True)
class Row:
    """One contender's distances.

    Args:
        setting: its name.
        pool: of conv4.
        biases: whether its convolutions have them.
        second_order: or first order.
        who: library and engine.
        median: over seeds.
        times_plain: the median over that of the hand-written loop.
        far: number of seeds above 1e-3.
        distances: of each seed.
    """

    setting: str
    pool: str
    biases: bool
    second_order: bool
    who: str
    median: float
    times_plain: float
    far: int
    distances: tuple[float, ...]


def run_float32_table(config: BenchmarkConfig, output_dir: Path) -> None:
    """Measure, print a table for each setting, and write ``benchmark.json``; ``bench.repeats`` is the number of seeds.

    Raises:
        ConfigError: if the device is not there, or the data set is not made of images.
        DataError: if the data set is missing or damaged.
    """
    device = resolve_device(config.run.device)
    splits = load_data(config).to(device)
    seeds = range(config.run.seed, config.run.seed + config.bench.repeats)
    settings = [s for s in FLOAT32_SETTINGS if config.bench.setting in ("all", s.name)]
    report = {
        "command": f"python scripts/benchmark.py bench.kind=float32 bench.setting={config.bench.setting} "
        f"bench.repeats={config.bench.repeats} data={config.data.name}",
        "machine": describe_hardware(device),
        "dataset": config.data.name,
        "seeds": list(seeds),
    }
    rows: list[Row] = []
    path = output_dir / "benchmark.json"
    with precision_context("float32", device), progress_bar() as progress:
        for setting in settings:
            found = measure(setting, splits, seeds, progress)
            rows += found
            content = {**report, "settings": [asdict(s) for s in settings], "rows": [asdict(row) for row in rows]}
            files.atomic_write_text(path, json.dumps(content, indent=2) + "\n")
            print_rows(setting, found)
    print_path("Written to", path)


def measure(setting: MetaStepSpec, splits: ImageSplits, seeds: Sequence[int], progress: Progress) -> list[Row]:
    """A row for each network, order and contender."""
    rows: list[Row] = []
    bar = progress.add_task(setting.name, total=len(_NETWORKS) * len(seeds), note="")
    for pool, biases in _NETWORKS:
        distances: dict[tuple[bool, str], list[float]] = {}
        for seed in seeds:
            for key, distance in _distances(setting, splits, seed, pool=pool, biases=biases).items():
                distances.setdefault(key, []).append(distance)
            progress.advance(bar)
        rows += [
            _row(setting, pool, biases, key, found, plain=distances[key[0], BY_HAND])
            for key, found in distances.items()
        ]
    return rows


def _distances(
    setting: MetaStepSpec, splits: ImageSplits, seed: int, *, pool: str, biases: bool
) -> dict[tuple[bool, str], float]:
    """Of every contender, by its order and name, to the hand-written loop's float64 gradient."""
    torch.manual_seed(seed)
    shape = TaskShape(setting.ways, setting.shots, setting.queries)
    sampler = splits.sampler("train", shape, seed)
    module = Conv4(setting.ways, channels=sampler.example_shape[0], width=setting.width, pool=pool)
    if biases:
        add_biases(module)
    module.to(splits.train.device)
    episodes = sampler.batch(0, setting.tasks)
    found = build_methods(InnerLoop(lr=setting.lr, steps=setting.steps), {BY_HAND: by_hand.meta_gradient})
    exact = {c.second_order: c.gradient(module, episodes, torch.float64) for c in found if c.library == BY_HAND}
    return {
        (c.second_order, c.who): relative_error(c.gradient(module, episodes, torch.float32), exact[c.second_order])
        for c in found
    }


def add_biases(module: Conv4) -> None:
    """Give every convolution a bias, in place."""
    convolutions = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)}
    for name, bare in convolutions.items():
        module.set_submodule(name, nn.Conv2d(bare.in_channels, bare.out_channels, 3, stride=bare.stride[0], padding=1))


def _row(
    setting: MetaStepSpec, pool: str, biases: bool, key: tuple[bool, str], found: list[float], *, plain: list[float]
) -> Row:
    second_order, who = key
    median = statistics.median(found)
    far = sum(not distance <= _FAR for distance in found)
    times_plain = median / statistics.median(plain)
    return Row(setting.name, pool, biases, second_order, who, median, times_plain, far, tuple(found))


def print_rows(setting: MetaStepSpec, rows: Sequence[Row]) -> None:
    """A line for each network and order, a column for each contender."""
    names = list(dict.fromkeys(row.who for row in rows))
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        biases = ", biases" if row.biases else ""
        lines.setdefault(f"{row.pool}{biases}, {order_name(row.second_order)}", {})[row.who] = row
    seeds = len(rows[0].distances)
    print_table(
        f"{setting.ways}-way {setting.shots}-shot, K={setting.steps}: |g32 - g64| / |g64|, median of {seeds} seeds\n"
        f"(times the {BY_HAND}'s; seeds above {_FAR:.0e})",
        ["", *names],
        [[name, *(_cell(found.get(who)) for who in names)] for name, found in lines.items()],
    )


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row.median:.1e} ({row.times_plain:.2f}; {row.far})"
