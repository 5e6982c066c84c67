"""Verify the engines on this machine: run every comparison, print the worst errors and a verdict, and save them."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import rich
import torch
from rich.text import Text

from metalearn.commands.verify.cases import MODEL_CASES, Case, NumericSetting, custom_cases
from metalearn.commands.verify.comparisons import (
    ADAPTED,
    ALL,
    BY_HAND,
    DIFFERENCES,
    UNROLL,
    Comparison,
    compare,
    tolerance,
)
from metalearn.config.commands_schema import VerifyConfig
from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.common import NOT_INSTALLED, PEERS, installed_peers
from metalearn.training.experiment import resolve_device
from metalearn.training.tracking.console import print_path, print_table, progress_bar

_TRUTH = "truth"
_LEGEND = (
    "A number is the worst of all K. unroll, checkpoint, adjoint: the engine against unroll on all tasks "
    "at once. Other columns: the worst engine against that reference. by hand: a loop over tasks by plain autograd. "
    "truth: in first order the query gradient at the adapted weights; in second order central differences of the loss, "
    "always in float64. bn task, bn frozen: BatchNorm with running statistics. in parts: conv4 in chunks of two tasks "
    "with every other checkpoint. dropout draws masks; no_grad stops a gradient midway. -: not compared, as the "
    "reference is the same computation or draws other random numbers."
)


def run_verification(config: VerifyConfig, output_dir: Path) -> bool:
    """Compare the engines, print table and verdict, and write ``verify.json``; return True if all passed.

    Raises:
        ConfigError: if the user's own model or update rule cannot be made.
    """
    started = time.perf_counter()
    setting = NumericSetting(getattr(torch, config.run.dtype), resolve_device(config.run.device), config.run.seed)
    peers, missing = installed_peers(PEERS)
    choices = itertools.product(
        [*MODEL_CASES, *custom_cases(config)], (False, True), dict.fromkeys(config.verify.steps)
    )
    cases = [Case(*choice) for choice in choices]
    results: dict[Case, list[Comparison]] = {}
    logging.getLogger("metalearn.metagrad.adjoint").setLevel(logging.ERROR)  # the fallback for no_grad is intended
    with progress_bar() as progress:
        bar = progress.add_task("cases", total=len(cases), note="")
        for case in cases:
            progress.update(bar, note=case.name)
            results[case] = compare(case, setting, peers)
            progress.advance(bar)
        progress.update(bar, note="")
    path = output_dir / "verify.json"
    comparisons = [comparison for row in results.values() for comparison in row]
    write_json(path, comparisons, setting, missing, time.perf_counter() - started)
    print_results(results, setting, missing)
    print_path("Written to", path)
    return all(comparison.passed for comparison in comparisons)


def write_json(
    path: Path, comparisons: Sequence[Comparison], setting: NumericSetting, missing: dict[str, str], seconds: float
) -> None:
    """Write ``verify.json``: machine, setting, and every comparison."""
    entries = []
    for c in comparisons:
        error = c.error if c.error is None or math.isfinite(c.error) else str(c.error)  # JSON has no NaN
        entry = {**asdict(c), "error": error, "seconds": round(c.seconds, 4), "holds": c.passed}
        entries.append({"bound" if name == "tolerance" else name: value for name, value in entry.items()})
    content = {
        "right": all(comparison.passed for comparison in comparisons),
        "machine": {**describe_hardware(setting.device), "threads": 1},
        "torch": str(torch.__version__),
        "device": str(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "seed": setting.seed,
        "seconds": round(seconds, 3),
        "not_compared": missing,
        "comparisons": entries,
    }
    files.atomic_write_json(path, content, allow_nan=False)


def print_results(results: dict[Case, list[Comparison]], setting: NumericSetting, missing: dict[str, str]) -> None:
    """Print a row for each model and order, the tolerances, the failures, and the verdict."""
    columns = [*ENGINES, BY_HAND, *PEERS, _TRUTH]
    rows: list[list[str | Text]] = []
    for (model, second_order), group in itertools.groupby(results, key=lambda case: (case.model, case.second_order)):
        row = [comparison for case in group for comparison in results[case]]
        label = f"{model.name} {'2nd' if second_order else '1st'}"
        rows.append([label, *(_worst_error([c for c in row if _is_in_column(c, column)]) for column in columns)])
    for order, truth in (("1st", ADAPTED), ("2nd", DIFFERENCES)):
        bounds = {column: f"{tolerance(UNROLL, setting.dtype):.0e}" for column in columns}
        bounds |= {_TRUTH: f"{tolerance(truth, setting.dtype):.0e}"}
        bounds |= {name: "absent" if why == NOT_INSTALLED else "broken" for name, why in missing.items()}
        rows.append([f"bound, {order}", *bounds.values()])
    title = f"Relative errors of meta-gradients, {str(setting.dtype).removeprefix('torch.')} on {setting.device}"
    header = {
        "checkpoint": "check-\npoint",
        "adjoint": "ad-\njoint",
        "learn2learn": "learn2\nlearn",
        BY_HAND: "by\nhand",
    }
    header |= {"TorchOpt": "Torch\nOpt"}
    print_table(title, ["model, order", *(header.get(column, column) for column in columns)], rows)

    console = rich.get_console()
    console.print(Text(_LEGEND, style="dim"))
    for name, why in missing.items():
        console.print(Text(f"{name}: {why}, so nothing is compared with it; see requirements-peers.txt"))
    comparisons = [comparison for row in results.values() for comparison in row]
    for comparison in comparisons:
        if not comparison.passed:
            console.print(Text(describe_failure(comparison), style="bold red"))
    console.print(Text(verdict(comparisons)))


def _is_in_column(comparison: Comparison, column: str) -> bool:
    if comparison.engine == ALL:
        return True
    if column in ENGINES:
        return comparison.engine == column and comparison.reference == UNROLL
    return comparison.reference in ((ADAPTED, DIFFERENCES) if column == _TRUTH else (column,))


def _worst_error(comparisons: Sequence[Comparison]) -> str | Text:
    if not comparisons:
        return "-"
    worst = max(comparisons, key=error_over_tolerance)
    text = "raised" if worst.error is None else f"{worst.error:.0e}" if worst.error else "0"
    return text if worst.passed else Text(text, style="bold red")


def error_over_tolerance(comparison: Comparison) -> float:
    """Return the error divided by the tolerance; infinity for an exception or NaN."""
    error = comparison.error
    return math.inf if error is None or math.isnan(error) else error / comparison.tolerance


def describe_failure(comparison: Comparison) -> str:
    """Return a sentence about a failed comparison."""
    subject = "it raised" if comparison.engine == ALL else f"{comparison.engine} against {comparison.reference}"
    if comparison.error is None:
        return f"FAILED {comparison.case}: {subject}: {comparison.message}"
    return f"FAILED {comparison.case}: {subject}: error {comparison.error:.2g}, bound {comparison.tolerance:.0e}"


def verdict(comparisons: Sequence[Comparison]) -> str:
    """Return a sentence with the number of comparisons and failures, and the worst error relative to its tolerance."""
    failed = sum(not comparison.passed for comparison in comparisons)
    worst = max(comparisons, key=error_over_tolerance)
    ratio = error_over_tolerance(worst)
    size = f"{ratio:.2g} times its bound" if math.isfinite(ratio) else "no finite error"
    return (
        f"{len(comparisons)} comparisons, {f'{failed} FAILED' if failed else 'all within their bounds'}. "
        f"The worst: {worst.case}, {worst.engine} against {worst.reference}, at {size}."
    )
