"""Proof that the engines are right on this machine: every comparison, a table of the worst, and a verdict."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich
import torch
from rich.text import Text

from metalearn.commands.verify.cases import SUBJECTS, Case, NumericSetting
from metalearn.commands.verify.comparisons import ADAPTED, ALL, DIFFERENCES, UNROLL, Comparison, compare, tolerance
from metalearn.config.commands_schema import VerifyConfig
from metalearn.core import serialization as files
from metalearn.core.profiling.hardware import describe_hardware
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.common import NOT_INSTALLED, PEERS, installed_peers
from metalearn.training.experiment import resolve_device
from metalearn.training.tracking.console import print_path, print_table, progress_bar

_TRUTH = "truth"
_LEGEND = (
    "unroll, checkpoint, adjoint: the engine against unroll with all tasks at once. Other columns: the worst engine "
    "against that. truth: in first order the query gradient at the adapted weights; in second order central "
    "differences of the loss, always taken in float64. in parts: conv4 in chunks of two tasks with every other "
    "snapshot; dropout draws masks; no_grad stops a gradient midway. -: not compared, as that would be with itself, or "
    "draw other random numbers."
)


def run_verification(config: VerifyConfig, output_dir: Path) -> bool:
    """Compare, print the table and the verdict, and write ``verify.json``.

    Returns:
        Whether every comparison keeps its bound.

    Raises:
        ConfigError: if the device is not there.
    """
    started = time.perf_counter()
    setting = NumericSetting(getattr(torch, config.run.dtype), resolve_device(config.run.device), config.run.seed)
    peers, missing = installed_peers(PEERS)
    cases = [
        Case(subject, second_order, steps)
        for subject in SUBJECTS
        for second_order in (False, True)
        for steps in dict.fromkeys(config.verify.steps)
    ]
    found: dict[Case, list[Comparison]] = {}
    logging.getLogger("metalearn.metagrad.adjoint").setLevel(logging.ERROR)  # the case no_grad falls back, as it must
    with progress_bar() as progress:
        bar = progress.add_task("cases", total=len(cases), note="")
        for case in cases:
            progress.update(bar, note=case.name)
            found[case] = compare(case, setting, peers)
            progress.advance(bar)
        progress.update(bar, note="")
    path = output_dir / "verify.json"
    comparisons = [comparison for row in found.values() for comparison in row]
    files.atomic_write_text(path, report(comparisons, setting, missing, seconds=time.perf_counter() - started))
    show(found, setting, missing)
    print_path("Written to", path)
    return all(comparison.holds for comparison in comparisons)


def report(
    comparisons: Sequence[Comparison], setting: NumericSetting, missing: dict[str, str], *, seconds: float
) -> str:
    """``verify.json``: where it was, and every comparison."""
    content = {
        "right": all(comparison.holds for comparison in comparisons),
        "machine": {**describe_hardware(setting.device), "threads": 1},
        "torch": str(torch.__version__),
        "device": str(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "seed": setting.seed,
        "seconds": round(seconds, 3),
        "not_compared": missing,
        "comparisons": [_entry(comparison) for comparison in comparisons],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _entry(comparison: Comparison) -> dict[str, Any]:
    error = comparison.error
    shown = error if error is None or math.isfinite(error) else str(error)  # JSON knows no infinity and no NaN
    return {
        **asdict(comparison),
        "error": shown,
        "seconds": round(comparison.seconds, 4),
        "holds": comparison.holds,
    }


def show(found: dict[Case, list[Comparison]], setting: NumericSetting, missing: dict[str, str]) -> None:
    """Print a row a case, the bounds, what failed, and the verdict."""
    columns = [*ENGINES, *PEERS, _TRUTH]
    rows = [
        [_label(case), *(_cell([c for c in row if _belongs(c, column)]) for column in columns)]
        for case, row in found.items()
    ]
    for order, truth in (("1st", ADAPTED), ("2nd", DIFFERENCES)):
        bounds = {column: f"{tolerance(UNROLL, setting.dtype):.0e}" for column in columns}
        bounds |= {_TRUTH: f"{tolerance(truth, setting.dtype):.0e}"}
        bounds |= {name: "absent" if why == NOT_INSTALLED else "broken" for name, why in missing.items()}
        rows.append([f"bound, {order}", *bounds.values()])
    title = f"Relative errors of meta-gradients, {str(setting.dtype).removeprefix('torch.')} on {setting.device}"
    header = {"checkpoint": "check-\npoint", "adjoint": "ad-\njoint", "learn2learn": "learn2\nlearn"}
    header |= {"TorchOpt": "Torch\nOpt"}
    print_table(title, ["model, order, K", *(header.get(column, column) for column in columns)], rows)
    console = rich.get_console()
    console.print(Text(_LEGEND, style="dim"))
    for name, why in missing.items():
        console.print(Text(f"{name}: {why}, so that nothing is compared with it; see requirements-peers.txt"))
    comparisons = [comparison for row in found.values() for comparison in row]
    for comparison in comparisons:
        if not comparison.holds:
            console.print(Text(describe_failure(comparison), style="bold red"))
    console.print(Text(verdict(comparisons)))


def _label(case: Case) -> str:
    return f"{case.subject.name} {'2nd' if case.second_order else '1st'} {case.steps}"


def _belongs(comparison: Comparison, column: str) -> bool:
    """Whether a comparison is one of those that a column shows the worst of."""
    if comparison.engine == ALL:
        return True
    if column in ENGINES:
        return comparison.engine == column and comparison.reference == UNROLL
    return comparison.reference in ((ADAPTED, DIFFERENCES) if column == _TRUTH else (column,))


def error_over_tolerance(comparison: Comparison) -> float:
    """The error as a share of its bound; what raised or is NaN is worse than any."""
    error = comparison.error
    return math.inf if error is None or math.isnan(error) else error / comparison.bound


def _cell(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "-"
    worst = max(comparisons, key=error_over_tolerance)
    text = "raised" if worst.error is None else f"{worst.error:.0e}" if worst.error else "0"
    return text if worst.holds else f"[bold red]{text}[/]"


def describe_failure(comparison: Comparison) -> str:
    """A comparison that failed, in words."""
    what = "it raised" if comparison.engine == ALL else f"{comparison.engine} against {comparison.reference}"
    if comparison.error is None:
        return f"FAILED {comparison.case}: {what}: {comparison.message}"
    return f"FAILED {comparison.case}: {what}: error {comparison.error:.2g}, bound {comparison.bound:.0e}"


def verdict(comparisons: Sequence[Comparison]) -> str:
    """How many comparisons there were, and the worst in relation to its bound."""
    wrong = sum(not comparison.holds for comparison in comparisons)
    worst = max(comparisons, key=error_over_tolerance)
    size = (
        f"{error_over_tolerance(worst):.2g} times its bound"
        if math.isfinite(error_over_tolerance(worst))
        else "no number within any bound"
    )
    said = f"{len(comparisons)} comparisons, " + (f"{wrong} FAILED" if wrong else "all within their bounds")
    return f"{said}. The worst: {worst.case}, {worst.engine} against {worst.reference}, at {size}."
