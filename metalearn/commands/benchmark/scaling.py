"""Measure how training scales on this machine: meta-steps a second of one process and of two.

    python -m metalearn.commands.benchmark.scaling OUTPUT_DIR [KEY=VALUE ...]

Keys are those of scripts/train.py; the default is Finn's 5-way 1-shot training, 32 tasks a meta-step, on glyphs and the
CPU. Three layouts take turns: one process with one thread, one with two threads, and two with one thread each (under
torchrun, with one all-reduce a meta-step, by gloo). They share the same 32 tasks: an efficiency of 1 is a meta-step in
half of the time. Medians over the rounds are written to OUTPUT_DIR/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from metalearn.commands.processes import ProcessPool
from metalearn.commands.shell import exit_when_stdout_closes
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import resolve_data
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core import serialization as files
from metalearn.core.errors import MetalearnError, RunError
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.training.auto_engine import resolve_auto_engine
from metalearn.training.experiment import Experiment, build_experiment, training_device
from metalearn.training.runtime.distributed import DistributedContext, init_distributed
from metalearn.training.state import TrainState
from metalearn.training.step import apply_meta_update, compute_meta_update, local_tasks
from metalearn.training.tracking.console import print_path, print_table

FILE = "scaling.json"
_DEFAULTS = {"experiment": "omniglot_5way_1shot", "data": "glyphs", "run.device": "cpu"}
_WARM_UPS = 3
_ALL_REDUCES = 50
_MAX_ERROR_LENGTH = 600


@dataclass(frozen=True)
class ProcessLayout:
    """Number of processes that share a meta-step's tasks, and of threads in each."""

    processes: int
    threads: int


LAYOUTS = (ProcessLayout(1, 1), ProcessLayout(1, 2), ProcessLayout(2, 1))


def load_config(overrides: Sequence[str]) -> TrainConfig:
    """Return the configuration of the training that is timed; raise ``ConfigError`` naming invalid keys."""
    keys = {override.partition("=")[0] for override in overrides}
    defaults = [f"{key}={value}" for key, value in _DEFAULTS.items() if key not in keys]
    config = to_dataclass(compose("train", [*defaults, *overrides]), TrainConfig)
    validate_train_config(config)
    return resolve_data(config)


def run_worker(config: TrainConfig, threads: int, steps: int, path: Path) -> None:
    """Run one process of a layout; the main one writes the seconds of a meta-step and of an all-reduce to ``path``."""
    torch.set_num_threads(threads)
    with init_distributed(training_device(config)) as ranks:
        experiment = resolve_auto_engine(build_experiment(config))
        with experiment.precision():
            meta_step_s = _meta_step_s(experiment, ranks, steps)
        gradient = torch.zeros(sum(p.numel() for p in experiment.theta.values()), device=experiment.device)
        measured = {
            "meta_step_s": meta_step_s,
            "all_reduce_s": _all_reduce_s(gradient, ranks) if ranks.size > 1 else None,
            "gradient_bytes": gradient.nbytes,
            "machine": describe_hardware(experiment.device),
        }
        if ranks.is_main:
            files.atomic_write_json(path, measured)


def _meta_step_s(experiment: Experiment, ranks: DistributedContext, steps: int) -> float:
    """Return the mean time of a meta-step, with sampling and the optimiser."""
    state = TrainState.create(experiment.theta, experiment.config.outer)
    for done in range(_WARM_UPS + steps):
        if done == _WARM_UPS:
            started = _synchronized_time(experiment.device, ranks)
        update = compute_meta_update(experiment, state, local_tasks(experiment, state.iteration, ranks), ranks)
        apply_meta_update(state, update, clip_norm=experiment.config.outer.clip_norm)
    return (_synchronized_time(experiment.device, ranks) - started) / steps


def _all_reduce_s(gradient: torch.Tensor, ranks: DistributedContext) -> float:
    def once() -> float:
        started = _synchronized_time(gradient.device, ranks)
        ranks.all_reduce_sum([gradient])
        return time.perf_counter() - started

    return median([once() for _ in range(_WARM_UPS + _ALL_REDUCES)][_WARM_UPS:])


def _synchronized_time(device: torch.device, ranks: DistributedContext) -> float:
    """Return the time at which every process has reached this point."""
    ranks.all_reduce_sum([torch.zeros(1, device=device)])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def worker_command(layout: ProcessLayout, overrides: Sequence[str], steps: int, path: Path) -> list[str]:
    """Return the command that starts a layout's processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.processes}"]
    launcher = [sys.executable, *(torchrun if layout.processes > 1 else [])]
    flags = [f"--worker-threads={layout.threads}", f"--steps={steps}"]
    return [*launcher, "-m", "metalearn.commands.benchmark.scaling", str(path), *overrides, *flags]


def measure_layouts(
    overrides: Sequence[str], folder: Path, *, rounds: int, steps: int
) -> dict[ProcessLayout, list[dict[str, Any]]]:
    """Return what every layout's main process measured in each round; raise ``RunError`` if a process fails."""
    measurements: dict[ProcessLayout, list[dict[str, Any]]] = {layout: [] for layout in LAYOUTS}
    console = folder / "console.log"
    with ProcessPool() as children:
        for layout in LAYOUTS * rounds:
            path = folder / f"{layout.processes}x{layout.threads}.json"
            command = worker_command(layout, overrides, steps, path)
            status, written = children.run(command, console, threads=layout.threads, callback=lambda piece: None)
            if status:
                raise RunError(f"{layout} ended with status {status}: {written.strip()[-_MAX_ERROR_LENGTH:]}")
            measurements[layout].append(json.loads(path.read_text()))
            path.unlink()
    return measurements


def summarize(measurements: dict[ProcessLayout, list[dict[str, Any]]], tasks: int) -> dict[str, Any]:
    """Return the content of ``scaling.json``: medians, and ratios to one process with one thread."""
    seconds = {layout: median(measured["meta_step_s"] for measured in measurements[layout]) for layout in measurements}
    single = seconds[ProcessLayout(1, 1)]
    pair = measurements[ProcessLayout(2, 1)]
    rows = [
        {
            **asdict(layout),
            "meta_step_ms": 1000 * taken,
            "rounds_ms": [1000 * measured["meta_step_s"] for measured in measurements[layout]],
            "meta_steps_per_s": 1 / taken,
            "speed_up": single / taken,
            "efficiency": single / taken / (layout.processes * layout.threads),
        }
        for layout, taken in seconds.items()
    ]
    return {
        "machine": measurements[ProcessLayout(1, 1)][0]["machine"],
        "tasks": tasks,
        "gradient_bytes": pair[0]["gradient_bytes"],
        "all_reduce_ms": 1000 * median(measured["all_reduce_s"] for measured in pair),
        "rows": rows,
    }


def print_summary(content: dict[str, Any]) -> None:
    """Print a row for each layout."""
    ratios = ("meta_steps_per_s", "speed_up", "efficiency")
    print_table(
        f"{content['tasks']} tasks a meta-step; one all-reduce between two processes takes "
        f"{content['all_reduce_ms']:.2f} ms ({content['gradient_bytes'] / 1e6:.2f} MB)",
        ["processes", "threads\neach", "ms a\nmeta-step", "meta-steps\na second", "speed-up", "efficiency"],
        [
            [str(r["processes"]), str(r["threads"]), f"{r['meta_step_ms']:.1f}", *(f"{r[name]:.2f}" for name in ratios)]
            for r in content["rows"]
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all layouts; with ``--worker-threads``, run one of the measured processes."""
    assert __doc__
    parser = argparse.ArgumentParser(
        "python -m metalearn.commands.benchmark.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the training that is timed")
    parser.add_argument("--rounds", type=int, default=5, help="number of times that each layout is started (5)")
    parser.add_argument("--steps", type=int, default=20, help="timed meta-steps in each round (20)")
    parser.add_argument("--worker-threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(arguments)
    if min(args.rounds, args.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")
    if "=" in str(args.output_dir):
        parser.error(f"OUTPUT_DIR is {args.output_dir}, which looks like a KEY=VALUE; give the folder first")
    try:
        config = load_config(args.overrides)
        if args.worker_threads:
            run_worker(config, args.worker_threads, args.steps, args.output_dir)
            return
        path = args.output_dir / FILE
        if path.exists():
            raise RunError(f"{path} exists already, and is not overwritten; choose another folder.")
        measurements = measure_layouts(args.overrides, args.output_dir, rounds=args.rounds, steps=args.steps)
        content = {"overrides": args.overrides, **summarize(measurements, config.task.meta_batch)}
        files.atomic_write_json(path, content)
    except MetalearnError as error:
        sys.exit(str(error))
    print_summary(content)
    print_path("Written to", path)


if __name__ == "__main__":
    with exit_when_stdout_closes():
        main()
