"""How a training scales: meta-steps a second by one process and by two on this machine, and an estimate for N GPUs.

    python -m metalearn.commands.benchmark.scaling OUTPUT_DIR [KEY=VALUE ...]

Keys are those of scripts/train.py; without any it is Finn's 5-way 1-shot training, 32 tasks a meta-step, on glyphs and
the CPU. One process of one thread, one of two threads and two of one thread each (under torchrun, with one all-reduce
a meta-step, by gloo) take turns in processes of their own. They share the same 32 tasks: an efficiency of 1 is a
meta-step in half of the time. Medians over the rounds go into OUTPUT_DIR/scaling.json.
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

from metalearn.commands.benchmark.ring import LINKS, Interconnect, all_reduce_s, efficiency, tasks_per_second
from metalearn.commands.compare.launch import ProcessPool
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
from metalearn.training.step import apply_update, compute_update, local_tasks
from metalearn.training.tracking.console import print_path, print_table

FILE = "scaling.json"
_DEFAULTS = {"experiment": "omniglot_5way_1shot", "data": "glyphs", "run.device": "cpu"}
_WARM_UPS = 3
_ALL_REDUCES = 50
_LONGEST_REASON = 600


@dataclass(frozen=True)
class ProcessLayout:
    """Processes that share a meta-step's tasks, and threads of each."""

    processes: int
    threads: int


SETTINGS = (ProcessLayout(1, 1), ProcessLayout(1, 2), ProcessLayout(2, 1))


def configuration(overrides: Sequence[str]) -> TrainConfig:
    """The training that is timed.

    Raises:
        ConfigError: naming every key that is at fault.
    """
    given = {override.partition("=")[0] for override in overrides}
    defaults = [f"{key}={value}" for key, value in _DEFAULTS.items() if key not in given]
    config = to_dataclass(compose("train", [*defaults, *overrides]), TrainConfig)
    validate_train_config(config)
    return resolve_data(config)


def run_worker(config: TrainConfig, threads: int, steps: int, path: Path) -> None:
    """Be one of a setting's processes; the first writes the seconds of a meta-step and of an all-reduce to ``path``."""
    torch.set_num_threads(threads)
    with init_distributed(training_device(config)) as ranks:
        experiment = resolve_auto_engine(build_experiment(config))
        with experiment.precision():
            meta_step_s = _meta_step_s(experiment, ranks, steps)
        numbers = sum(p.numel() for p in experiment.theta.values())
        gradient = torch.zeros(numbers, device=experiment.device)
        figures = {
            "meta_step_s": meta_step_s,
            "all_reduce_s": _all_reduce_s(gradient, ranks) if ranks.size > 1 else None,
            "gradient_bytes": gradient.nbytes,
            "machine": describe_hardware(experiment.device),
        }
        if ranks.is_main:
            files.atomic_write_text(path, json.dumps(figures))


def _meta_step_s(experiment: Experiment, ranks: DistributedContext, steps: int) -> float:
    """Mean over meta-steps, each with its tasks and the optimiser's step."""
    state = TrainState.create(experiment.theta, experiment.config.outer)
    for done in range(_WARM_UPS + steps):
        if done == _WARM_UPS:
            started = _together(experiment.device, ranks)
        update = compute_update(experiment, state, local_tasks(experiment, state.iteration, ranks), ranks)
        apply_update(state, update, clip_norm=experiment.config.outer.clip_norm)
    return (_together(experiment.device, ranks) - started) / steps


def _all_reduce_s(gradient: torch.Tensor, ranks: DistributedContext) -> float:
    def once() -> float:
        started = _together(gradient.device, ranks)
        ranks.all_reduce_sum([gradient])
        return time.perf_counter() - started

    return median([once() for _ in range(_WARM_UPS + _ALL_REDUCES)][_WARM_UPS:])


def _together(device: torch.device, ranks: DistributedContext) -> float:
    """The time at which every process has come this far."""
    ranks.all_reduce_sum([torch.zeros(1, device=device)])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def worker_command(setting: ProcessLayout, overrides: Sequence[str], steps: int, path: Path) -> list[str]:
    """What starts a setting's processes."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setting.processes}"]
    launcher = [sys.executable, *(several if setting.processes > 1 else [])]
    flags = [f"--worker-threads={setting.threads}", f"--steps={steps}"]
    return [*launcher, "-m", "metalearn.commands.benchmark.scaling", str(path), *overrides, *flags]


def measure(
    overrides: Sequence[str], folder: Path, *, rounds: int, steps: int
) -> dict[ProcessLayout, list[dict[str, Any]]]:
    """What every setting's first process has written, in each round; the settings take turns.

    Raises:
        RunError: if a process fails, with the end of what it said.
    """
    found: dict[ProcessLayout, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
    with ProcessPool() as children:
        for _ in range(rounds):
            for setting in SETTINGS:
                path = folder / f"{setting.processes}x{setting.threads}.json"
                status, written = children.run(
                    worker_command(setting, overrides, steps, path),
                    folder / "console.log",
                    threads=setting.threads,
                    watch=lambda piece: None,
                )
                if status:
                    raise RunError(f"{setting} ended with status {status}: {written.strip()[-_LONGEST_REASON:]}")
                found[setting].append(json.loads(path.read_text()))
                path.unlink()
    return found


def report(found: dict[ProcessLayout, list[dict[str, Any]]], tasks: int) -> dict[str, Any]:
    """Medians, ratios to one process of one thread, and the estimates, as ``scaling.json`` holds them.

    Args:
        found: by setting, what was measured in each round.
        tasks: T, of a meta-step; the estimates are of as many on each GPU.
    """
    seconds = {setting: median(figures["meta_step_s"] for figures in found[setting]) for setting in found}
    alone = seconds[ProcessLayout(1, 1)]
    pair = found[ProcessLayout(2, 1)]
    size = pair[0]["gradient_bytes"]
    rows = [
        {
            **asdict(setting),
            "meta_step_ms": 1000 * taken,
            "rounds_ms": [1000 * figures["meta_step_s"] for figures in found[setting]],
            "meta_steps_per_s": 1 / taken,
            "speed_up": alone / taken,
            "efficiency": alone / taken / (setting.processes * setting.threads),
        }
        for setting, taken in seconds.items()
    ]
    return {
        "machine": found[ProcessLayout(1, 1)][0]["machine"],
        "tasks": tasks,
        "gradient_bytes": size,
        "all_reduce_ms": 1000 * median(figures["all_reduce_s"] for figures in pair),
        "rows": rows,
        "estimates": [_estimate(tasks, size, link) for link in LINKS],
    }


def _estimate(tasks: int, size: float, link: Interconnect) -> dict[str, Any]:
    return {
        **asdict(link),
        "all_reduce_ms": 1000 * all_reduce_s(size, link),
        "efficiency_at_1_ms": efficiency(1e-3, size, link),
        "efficiency_at_10_ms": efficiency(1e-2, size, link),
        "tasks_per_s_at_90%": tasks_per_second(0.9, tasks, size, link),
    }


def show(content: dict[str, Any]) -> None:
    """What was measured and estimated, as two tables."""
    header = ["processes", "threads each", "ms a meta-step", "meta-steps/s", "speed-up", "efficiency"]
    print_table(
        f"{content['tasks']} tasks a meta-step; one all-reduce between two processes takes "
        f"{content['all_reduce_ms']:.2f} ms ({content['gradient_bytes'] / 1e6:.2f} MB)",
        header,
        [_measured(row) for row in content["rows"]],
    )
    header = ["estimate", "all-reduce, ms", "efficiency at 1 ms", "at 10 ms", "90% up to, tasks/s a GPU"]
    print_table(
        f"{content['tasks']} tasks on each GPU, from assumed bandwidths and latencies",
        header,
        [_estimated(row) for row in content["estimates"]],
    )


def _measured(row: dict[str, Any]) -> list[str]:
    figures = [f"{row[name]:.2f}" for name in ("meta_steps_per_s", "speed_up", "efficiency")]
    return [str(row["processes"]), str(row["threads"]), f"{row['meta_step_ms']:.1f}", *figures]


def _estimated(row: dict[str, Any]) -> list[str]:
    shares = [f"{row[name]:.0%}" for name in ("efficiency_at_1_ms", "efficiency_at_10_ms")]
    return [row["name"], f"{row['all_reduce_ms']:.3f}", *shares, f"{row['tasks_per_s_at_90%']:,.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or with ``--worker-threads`` be one of the processes that are measured."""
    assert __doc__
    lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m metalearn.commands.benchmark.scaling", description=__doc__, formatter_class=lines
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the training that is timed")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is started, in turns (5)")
    parser.add_argument("--steps", type=int, default=20, help="meta-steps that are timed in each round (20)")
    parser.add_argument("--worker-threads", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_intermixed_args(arguments)
    if min(asked.rounds, asked.steps) < 1:
        parser.error("--rounds and --steps must be at least 1")
    if "=" in str(asked.output_dir):
        parser.error(f"OUTPUT_DIR is {asked.output_dir}, which looks like a KEY=VALUE; give the folder first")
    try:
        config = configuration(asked.overrides)
        if asked.worker_threads:
            run_worker(config, asked.worker_threads, asked.steps, asked.output_dir)
            return
        path = asked.output_dir / FILE
        if path.exists():
            raise RunError(f"{path} is there already, and is not overwritten; choose another folder.")
        found = measure(asked.overrides, asked.output_dir, rounds=asked.rounds, steps=asked.steps)
        content = {"overrides": asked.overrides, **report(found, config.task.meta_batch)}
        files.atomic_write_text(path, json.dumps(content, indent=2) + "\n")
    except MetalearnError as error:
        sys.exit(str(error))
    show(content)
    print_path("Written to", path)


if __name__ == "__main__":
    main()
