"""Measure how far meta-gradients in float32 are from float64, for the engines and for a plain loop over tasks.

    distance = |g32 - g64| / |g64|        of the whole gradient as one vector, at the same parameters and tasks, cast up

The network is conv4 at its initial weights, without biases, and with biases in its convolutions, which ``vmap`` then
batches layer by layer as it does a user's model. Medians over seeds: an input of ReLU that lies within rounding of its
kink may fall on either side of it, also in plain torch, and the distance is then some percent.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn

from metalearn.commands.benchmark.methods import BY_HAND, build_methods, order_name
from metalearn.commands.benchmark.settings import FLOAT32_SETTINGS, MetaStepSpec, pivot, selected
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.core import serialization as files
from metalearn.core.params import relative_error
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.data.sampler import TaskShape
from metalearn.data.splits import ImageSplits
from metalearn.inner import InnerLoop
from metalearn.metagrad.baselines import by_hand
from metalearn.models import Conv4
from metalearn.training.experiment import load_data, resolve_device
from metalearn.training.runtime.precision import precision_context
from metalearn.training.tracking.console import print_path, print_table, progress_bar

_FAR = 1e-3
_NETWORKS = [(pool, biases) for pool in ("stride", "max") for biases in (False, True)]


@dataclass(frozen=True)
class Float32Error:
    """Distances of one method, over seeds; the fields are the keys of a row of ``benchmark.json``.

    Args:
        times_plain: the median divided by that of the hand-written loop.
        far: number of seeds with a distance above 1e-3.
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
        ConfigError: if the device does not exist, or the data set has no images.
        DataError: if the data set is missing or damaged.
    """
    device = resolve_device(config.run.device)
    splits = load_data(config).to(device)
    seeds = range(config.run.seed, config.run.seed + config.bench.repeats)
    settings = selected(config, FLOAT32_SETTINGS)
    report = {
        "command": f"python scripts/benchmark.py bench.kind=float32 bench.setting={config.bench.setting} "
        f"bench.repeats={config.bench.repeats} data={config.data.name}",
        "machine": describe_hardware(device),
        "dataset": config.data.name,
        "seeds": list(seeds),
    }
    rows: list[Float32Error] = []
    path = output_dir / "benchmark.json"
    with precision_context("float32", device), progress_bar() as progress:
        for setting in settings:
            errors = measure_setting(setting, splits, seeds, progress)
            rows += errors
            content = {**report, "settings": [asdict(s) for s in settings], "rows": [asdict(row) for row in rows]}
            files.atomic_write_json(path, content)
            print_errors(setting, errors)
    print_path("Written to", path)


def measure_setting(
    setting: MetaStepSpec, splits: ImageSplits, seeds: Sequence[int], progress: Progress
) -> list[Float32Error]:
    """Return the distances for each network, order and method."""
    errors: list[Float32Error] = []
    bar = progress.add_task(setting.name, total=len(_NETWORKS) * len(seeds), note="")
    for pool, biases in _NETWORKS:
        distances: dict[tuple[bool, str], list[float]] = {}
        for seed in seeds:
            for key, distance in _distances(setting, splits, seed, pool=pool, biases=biases).items():
                distances.setdefault(key, []).append(distance)
            progress.advance(bar)
        for (second_order, label), found in distances.items():
            median = statistics.median(found)
            ratio = median / statistics.median(distances[second_order, BY_HAND])
            far = sum(not distance <= _FAR for distance in found)
            row = setting.name, pool, biases, second_order, label
            errors.append(Float32Error(*row, median, ratio, far, tuple(found)))
    return errors


def _distances(
    setting: MetaStepSpec, splits: ImageSplits, seed: int, *, pool: str, biases: bool
) -> dict[tuple[bool, str], float]:
    """Return each method's distance to the hand-written loop's float64 gradient, by order and label."""
    torch.manual_seed(seed)
    shape = TaskShape(setting.ways, setting.shots, setting.queries)
    sampler = splits.sampler("train", shape, seed)
    module = Conv4(setting.ways, channels=sampler.example_shape[0], width=setting.width, pool=pool)
    if biases:
        add_biases(module)
    module.to(splits.train.device)
    episodes = sampler.batch(0, setting.tasks)
    methods = build_methods(InnerLoop(lr=setting.lr, steps=setting.steps), {BY_HAND: by_hand.meta_gradient})
    exact = {m.second_order: m.gradient(module, episodes, torch.float64) for m in methods if m.library == BY_HAND}
    return {
        (m.second_order, m.label): relative_error(m.gradient(module, episodes, torch.float32), exact[m.second_order])
        for m in methods
    }


def add_biases(module: Conv4) -> None:
    """Give every convolution a bias, in place."""
    convolutions = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)}
    for name, bare in convolutions.items():
        module.set_submodule(name, nn.Conv2d(bare.in_channels, bare.out_channels, 3, stride=bare.stride[0], padding=1))


def print_errors(setting: MetaStepSpec, errors: Sequence[Float32Error]) -> None:
    """Print a row for each network and order, a column for each method."""
    cells = {}
    for row in errors:
        name = f"{row.pool}{', biases' if row.biases else ''},\n{order_name(row.second_order)}"
        cells[name, row.who.replace(" ", "\n", 1)] = f"{row.median:.1e}\n({row.times_plain:.2f}; {row.far})"
    seeds = len(errors[0].distances)
    title = f"{setting.ways}-way {setting.shots}-shot, K={setting.steps}: |g32 - g64| / |g64|, median of {seeds} seeds"
    header, *table = pivot(cells)
    print_table(f"{title}\n(relative to the {BY_HAND}; seeds above {_FAR:.0e})", header, table)
