"""Text after a training: where to look, the other order to compare with, and a table of the runs of ``--multirun``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metalearn.commands.command_line import command_again, is_sweep
from metalearn.commands.shell import tensorboard
from metalearn.config.schema import TrainConfig
from metalearn.core.json_files import read_metrics
from metalearn.training.evaluate_run import format_test
from metalearn.training.tracking.console import print_line, print_table

_WITHOUT_ORDERS = ("imaml", "protonet", "reptile")


def print_next_steps(config: TrainConfig, run_dir: Path) -> None:
    """Print the command for TensorBoard, and that of the same run in the other order; after one run, not a sweep."""
    if is_sweep():
        return
    print_line(f"To see its plots:\n  {tensorboard(run_dir.parent)}")
    if config.algorithm.name not in _WITHOUT_ORDERS and config.inner.steps > 0:
        other = not config.inner.second_order
        again = command_again("train", f"inner.second_order={str(other).lower()}")
        print_line(f"To compare with the {'second' if other else 'first'} order:\n  {again}")


def print_runs(runs: Sequence[tuple[Sequence[str], Path]]) -> None:
    """Print the test of each run of a sweep, named by the overrides that are not common to all.

    Args:
        runs: overrides and folder of each.
    """
    rows = []
    for overrides, folder in runs:
        if (metrics := read_metrics(folder)) is None:  # of a command that tests nothing
            continue
        own = [one for one in overrides if not all(one in others for others, _ in runs)]
        minutes = f"{metrics['time.total_s'] / 60:.1f}" if "time.total_s" in metrics else ""
        rows.append([" ".join(own) or folder.name, format_test(metrics), minutes])
    if rows:
        print_table(f"{len(rows)} runs", ["", "test", "minutes"], rows)
