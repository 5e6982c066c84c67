"""Made-up results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from metalearn.commands.benchmark.settings import EngineCost
from metalearn.commands.compare.results import CurvePoint, Difference, Results, RunResult, TimeToAccuracy, VariantResult
from metalearn.training.evaluation import MeanCI

SPREAD = (-0.004, 0.001, 0.003)  # of three seeds around their mean; the sum is zero
ITERATIONS = tuple(range(0, 1001, 50))


def finished_run(name: str, seed: int, accuracy: float, *, ms: float, mib: float) -> RunResult:
    metrics = {
        "test.accuracy": accuracy,
        "test.ci95": 0.005,
        "test.accuracy_nontransductive": accuracy - 0.04,
        "test.ci95_nontransductive": 0.008,
        "time.meta_step_ms": ms,
        "memory.peak_mib": mib,
        "time.total_s": 75.0,
    }
    return RunResult(seed, f"{name}-seed{seed}", "finished", metrics=metrics)


def curve(top: float, *, ms: float, band: float) -> list[CurvePoint]:
    """Return a curve that rises from chance to ``top``."""
    means = [top - (top - 0.2) * math.exp(-i / 200) for i in ITERATIONS]
    return [CurvePoint(i, i * ms / 1000, m, m - band, m + band) for i, m in zip(ITERATIONS, means, strict=True)]


def variant(
    name: str,
    accuracy: float = 0.98,
    *,
    overrides: Sequence[str] = (),
    seeds: int = 3,
    ms: float = 48.0,
    mib: float = 54.5,
    cosine: float = 0.9,
) -> VariantResult:
    """Return a variant whose runs are all finished."""
    spread = SPREAD if seeds == 3 else (0.0,) * seeds
    band = 0.01 if seeds > 1 else 0.0
    return VariantResult(
        name,
        list(overrides) or [f"inner.variant={name}"],
        [finished_run(name, seed, accuracy + spread[seed], ms=ms, mib=mib) for seed in range(seeds)],
        accuracy=MeanCI(accuracy, 0.009),
        tasks_ci95=0.005,
        nontransductive=MeanCI(accuracy - 0.04, 0.012),
        per_step=[MeanCI(0.2, 0.004), *(MeanCI(accuracy - 0.02 * gap, 0.009) for gap in (2, 1, 0))],
        meta_step_ms=ms,
        peak_mib=mib,
        training_s=ms,
        time_to=TimeToAccuracy(0.6 * ms, 600, seeds),
        curve=curve(accuracy, ms=ms, band=band),
        cosine=[CurvePoint(i, i * ms / 1000, cosine - i / 5000, cosine - 0.2, cosine + 0.01) for i in ITERATIONS],
    )


def broken_variant(name: str, reason: str = "the loss is not finite") -> VariantResult:
    """Return a variant without metrics: one run failed, the other is unfinished."""
    runs = [RunResult(0, f"{name}-seed0", "failed", reason), RunResult(1, f"{name}-seed1", "unfinished")]
    return VariantResult(name, [], runs)


def difference(first: VariantResult, other: VariantResult, per_seed: Sequence[float], ci95: float) -> Difference:
    estimate = MeanCI(fmean(per_seed), ci95)
    return Difference(first.name, other.name, estimate, estimate, list(range(len(per_seed))), list(per_seed))


def cost_rows(limit_at: int | None = None) -> list[EngineCost]:
    """Return costs as measured for 20-way 1-shot; ``unroll`` exceeds the limit from ``limit_at`` on."""
    peaks = {
        "first order": (90.0, 90.0, 90.0, 90.0),
        "unroll": (274.0, 800.0, 1456.0, 2769.0),
        "checkpoint": (274.0, 295.0, 330.0, 399.0),
        "adjoint": (211.0, 232.0, 267.0, 336.0),
    }
    rows = []
    for name, mib in peaks.items():
        second_order = name != "first order"
        for steps, peak in zip((1, 5, 10, 20), mib, strict=True):
            over = name == "unroll" and limit_at is not None and steps >= limit_at
            ms = None if over else 100.0 * steps * (3.0 if second_order else 1.0)
            engine = name if second_order else "unroll"
            rows.append(EngineCost(engine, second_order, None, 1, steps, None if over else peak, ms))
    return rows


def results(
    variants: Sequence[VariantResult],
    differences: Sequence[Difference] = (),
    *,
    cost: Sequence[EngineCost] = (),
    seeds: int = 3,
    target: float | None = 0.95,
) -> Results:
    return Results(
        title="omniglot, 5-way 1-shot",
        dataset="omniglot",
        command="python scripts/compare.py data=omniglot",
        config="task:\n  ways: 5\n\ninner:\n  lr: 0.4\n",
        machine={"cpu": "some CPU", "cores": 2},
        memory_kind="cpu-tensors",
        iterations=1000,
        seeds=list(range(seeds)),
        target_accuracy=target,
        inner_steps=5,
        variants=list(variants),
        differences=list(differences),
        cost=list(cost),
    )


def two_orders(per_seed: Sequence[float] = (0.010, 0.012, 0.014), ci95: float = 0.005) -> Results:
    """Return first order behind second order, which takes twice the time and one and a half times the memory."""
    orders = (["inner.second_order=true"], ["inner.second_order=false"])
    second = variant("second_order", 0.98, overrides=orders[0], ms=48.0, mib=54.0, seeds=len(per_seed))
    first = variant("first_order", 0.968, overrides=orders[1], ms=24.0, mib=36.0, cosine=0.7, seeds=len(per_seed))
    return results([second, first], [difference(second, first, per_seed, ci95)], cost=cost_rows(), seeds=len(per_seed))
