"""One meta-step of the default, timed side by side with learn2learn's on the same weights and tasks.

First both must give the same meta-gradient in float64; then they take turns, so that a machine whose speed drifts
treats them alike. Times are medians over rounds, with the quartiles.
"""

from __future__ import annotations

import copy
import io
import json
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from metalearn import files
from metalearn.errors import RunError
from metalearn.inner import InnerLoop
from metalearn.live_bytes import MIB
from metalearn.metagrad import ENGINES, meta_gradient
from metalearn.params import functionalize, relative_error
from metalearn.runs.console import print_path, print_table, progress_bar
from metalearn.runs.experiment import build, build_model
from metalearn.runs.machine import machine
from metalearn.runs.memory import peak_bytes
from metalearn.runs.schema_commands import BenchmarkConfig
from metalearn.types import Episodes, MetaGradient, Params

_TOLERANCE = 1e-9  # of the relative difference between meta-gradients in float64
_WARM_UP = 2


@dataclass(frozen=True)
class Contender:
    """A way to compute the meta-gradient of a module."""

    library: str
    engine: str
    second_order: bool
    step: Callable[[nn.Module, Episodes], MetaGradient]

    @property
    def name(self) -> str:
        """As it stands in the table."""
        order = "second order" if self.second_order else "first order"
        return f"{self.library}{f' {self.engine}' if self.engine else ''}, {order}"


@dataclass(frozen=True)
class Figures:
    """Milliseconds of a meta-gradient over rounds, and the peak of its memory."""

    library: str
    engine: str
    second_order: bool
    median_ms: float
    quartiles_ms: tuple[float, float]
    peak_mib: float
    ratio_to_learn2learn: float


def contenders(inner: InnerLoop) -> list[Contender]:
    """Ours, with every engine, and learn2learn, in second order; then both in first order.

    Raises:
        RunError: if learn2learn is not installed.
    """
    try:
        with redirect_stderr(io.StringIO()):  # gym, which learn2learn imports, announces there that it is unmaintained
            from metalearn.peers import learn2learn
    except ImportError as error:
        raise RunError(
            f"learn2learn cannot be imported ({error}); install it with `pip install -r requirements-peers.txt`."
        ) from error

    found = []
    for second_order in (True, False):
        for engine in ENGINES if second_order else ("unroll",):  # in first order they are all the same
            ours = replace(inner, second_order=second_order, engine=engine)
            found.append(Contender("metalearn", engine, second_order, _of_module(ours)))
        theirs = replace(inner, second_order=second_order)
        found.append(Contender("learn2learn", "", second_order, _learn2learn(learn2learn.meta_gradient, theirs)))
    return found


def _of_module(inner: InnerLoop) -> Callable[[nn.Module, Episodes], MetaGradient]:
    def step(module: nn.Module, episodes: Episodes) -> MetaGradient:
        return meta_gradient(*functionalize(module), episodes, inner)

    return step


def _learn2learn(
    peer: Callable[[nn.Module, Episodes, InnerLoop], MetaGradient], inner: InnerLoop
) -> Callable[[nn.Module, Episodes], MetaGradient]:
    return lambda module, episodes: peer(module, episodes, inner)


def run_benchmark(config: BenchmarkConfig, output_dir: Path) -> None:
    """Compare, print the table, and write ``benchmark.json``.

    Raises:
        RunError: if learn2learn is missing, or if two contenders disagree on the meta-gradient.
    """
    experiment = build(config)
    torch.manual_seed(config.run.seed)
    module = build_model(config, experiment.train.images.shape[2:]).to(experiment.device)
    episodes = experiment.train.batch(0, config.task.meta_batch)
    found = contenders(experiment.inner)
    check_equal(found, module, episodes)
    times = time_in_turns(found, module, episodes, config.bench.rounds)
    figures = summarise(found, times, module, episodes)
    report = {
        "machine": machine(experiment.device),
        "task": {**asdict(config.task), "dataset": experiment.dataset},
        "inner": {"lr": config.inner.lr, "steps": config.inner.steps, "task_chunk": config.inner.task_chunk},
        "model": asdict(config.model),
        "rounds": config.bench.rounds,
        "rows": [asdict(row) for row in figures],
    }
    path = output_dir / "benchmark.json"
    files.write_text(path, json.dumps(report, indent=2) + "\n")
    print_table(
        f"One meta-gradient of {config.task.meta_batch} tasks; ratio of times to learn2learn, which takes them in turn",
        ["", "median ms", "quartiles", "ratio", "peak MiB"],
        [
            [
                contender.name,
                f"{row.median_ms:.1f}",
                "{:.1f} to {:.1f}".format(*row.quartiles_ms),
                f"{row.ratio_to_learn2learn:.2f}",
                f"{row.peak_mib:.1f}",
            ]
            for contender, row in zip(found, figures, strict=True)
        ],
    )
    print_path("Written to", path)


def check_equal(found: list[Contender], module: nn.Module, episodes: Episodes) -> None:
    """Refuse to time contenders that do not compute the same thing, in float64."""
    double = copy.deepcopy(module).double()
    tasks = Episodes(episodes.support_x.double(), episodes.support_y, episodes.query_x.double(), episodes.query_y)
    reference: dict[bool, Params] = {}
    for contender in found:
        grads = contender.step(double, tasks).grads
        expected = reference.setdefault(contender.second_order, {name: g.clone() for name, g in grads.items()})
        difference = relative_error(grads, expected)
        if not difference < _TOLERANCE:
            raise RunError(f"{contender.name} differs from {found[0].name} by {difference:.1e}; nothing was timed.")


def time_in_turns(found: list[Contender], module: nn.Module, episodes: Episodes, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round."""
    times: dict[str, list[float]] = {contender.name: [] for contender in found}
    with progress_bar() as progress:
        bar = progress.add_task("rounds, the first two to warm up", total=rounds + _WARM_UP, note="")
        for turn in range(rounds + _WARM_UP):
            for contender in found:
                _wait_for(episodes.query_x)
                started = time.perf_counter()
                contender.step(module, episodes)
                _wait_for(episodes.query_x)
                if turn >= _WARM_UP:
                    times[contender.name].append(1000 * (time.perf_counter() - started))
            progress.update(bar, completed=turn + 1)
    return times


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def summarise(
    found: list[Contender], times: dict[str, list[float]], module: nn.Module, episodes: Episodes
) -> list[Figures]:
    """Medians, quartiles, peaks, and the ratio to learn2learn at the same order: the median over rounds of each."""
    theirs = {c.second_order: times[c.name] for c in found if c.library == "learn2learn"}
    figures = []
    for contender in found:
        own = times[contender.name]
        low, _, high = statistics.quantiles(own, n=4)
        ratio = statistics.median(a / b for a, b in zip(own, theirs[contender.second_order], strict=True))
        peak = _peak_mib(contender, module, episodes)
        figures.append(
            Figures(
                contender.library,
                contender.engine,
                contender.second_order,
                statistics.median(own),
                (low, high),
                peak,
                ratio,
            )
        )
    return figures


def _peak_mib(contender: Contender, module: nn.Module, episodes: Episodes) -> float:
    module.zero_grad()
    return peak_bytes(lambda: contender.step(module, episodes), episodes.query_x.device) / MIB
