"""The results of a comparison, from which the tables, the plots and ``results.json`` are made.

Accuracies are fractions, memory is in MiB, times are in the unit that the name ends with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from metalearn.commands.benchmark.settings import EngineCost
from metalearn.training.evaluation import MeanCI


class CurvePoint(NamedTuple):
    """One meta-step of a curve over seeds; ``low`` and ``high`` are the lowest and the highest seed."""

    iteration: int
    training_s: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RunResult:
    """One training; its metrics are empty unless it is finished.

    Args:
        folder: relative to the comparison's.
        state: ``finished``, ``failed`` or ``unfinished``.
    """

    seed: int
    folder: str
    state: str
    reason: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TimeToAccuracy:
    """Time and meta-steps until validation reached the target: medians over the seeds that did, of two the lower."""

    training_s: float
    iterations: float
    seeds: int


@dataclass(frozen=True)
class VariantResult:
    """One variant over its finished runs; a metric without data is ``None`` or empty.

    Args:
        accuracy: on test classes, with its 95% interval over seeds and tasks.
        tasks_ci95: half-width over the test tasks only.
        nontransductive: accuracy where each query is predicted without the others.
        per_step: accuracy after 0, 1, ... inner steps.
        meta_step_ms: median over seeds of each run's median.
        peak_mib: highest of its runs.
        training_s: mean time spent in meta-steps.
        time_to: ``None`` where no seed reached the target.
        cosine: between the first- and the second-order meta-gradient.
    """

    name: str
    overrides: list[str]
    runs: list[RunResult]
    accuracy: MeanCI | None = None
    tasks_ci95: float | None = None
    nontransductive: MeanCI | None = None
    per_step: list[MeanCI] = field(default_factory=list)
    meta_step_ms: float | None = None
    peak_mib: float | None = None
    training_s: float | None = None
    time_to: TimeToAccuracy | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    cosine: list[CurvePoint] = field(default_factory=list)

    @property
    def finished(self) -> list[RunResult]:
        """Runs that have metrics."""
        return [run for run in self.runs if run.state == "finished"]


@dataclass(frozen=True)
class Difference:
    """The first variant's test accuracy minus another's, on the seeds that both finished.

    Accuracies have 95% intervals over seeds and tasks; ``paired`` tells whether both were tested on the same tasks.
    """

    first: str
    other: str
    accuracy: MeanCI
    nontransductive: MeanCI
    seeds: list[int]
    per_seed: list[float]
    paired: bool = True

    @property
    def is_significant(self) -> bool:
        """True if the 95% interval excludes zero."""
        return abs(self.accuracy.mean) > self.accuracy.ci95


@dataclass(frozen=True)
class Results:
    """A whole comparison; title, data set and hardware are those of the configuration that the variants share.

    Args:
        memory_kind: ``cuda`` or ``cpu-tensors``.
        target_accuracy: validation accuracy for ``TimeToAccuracy``; ``None`` while no run is finished.
        differences: first variant minus each other one.
        cost: of one meta-gradient against K: first order, and second order by every engine, all tasks at once.
        cost_limit_mib: at which a measurement of memory was stopped.
        cost_machine: hardware of that measurement, which may differ from that of the runs.
        cost_left_out: numbers K of inner steps whose measurement would have taken longer than the training.
        runs_at_a_time: number of runs that shared the machine.
    """

    title: str
    dataset: str
    command: str
    config: str
    machine: dict[str, Any]
    memory_kind: str
    iterations: int
    seeds: list[int]
    target_accuracy: float | None
    inner_steps: int
    variants: list[VariantResult]
    differences: list[Difference] = field(default_factory=list)
    cost: list[EngineCost] = field(default_factory=list)
    cost_limit_mib: float = 4096
    cost_machine: dict[str, Any] = field(default_factory=dict)
    cost_left_out: list[int] = field(default_factory=list)
    runs_at_a_time: int = 1

    @property
    def orders(self) -> tuple[VariantResult, VariantResult] | None:
        """The second- and the first-order variant if these are compared, and differ in nothing else."""
        names = ("inner.second_order=true", "inner.second_order=false")
        found = {" ".join(variant.overrides).lower(): variant for variant in self.variants}
        return (found[names[0]], found[names[1]]) if set(found) == set(names) else None

    @property
    def complete(self) -> bool:
        """True if every run of every variant is finished."""
        return all(run.state == "finished" for variant in self.variants for run in variant.runs)
