"""Every table fits into a terminal of 80 columns, with the longest names and numbers that it gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import rich
from rich.console import Console

from metalearn.commands.benchmark.float32 import Float32Error, print_errors
from metalearn.commands.benchmark.measure import (
    DATA,
    FORWARD,
    GRADIENT,
    OPTIMISER,
    SECOND_ORDER,
    BenchmarkResult,
    SweepSeries,
)
from metalearn.commands.benchmark.methods import BY_HAND, OURS
from metalearn.commands.benchmark.report import print_engine_costs, print_results, print_slopes, print_time_breakdown
from metalearn.commands.benchmark.scaling import print_summary
from metalearn.commands.benchmark.settings import (
    ENGINE_SETTINGS,
    FLOAT32_SETTINGS,
    LIBRARY_SETTINGS,
    SWEEPS,
    EngineBenchmark,
    EngineCost,
    MetaStepSpec,
)
from metalearn.metagrad import ENGINES

TITLE = max((setting.title for setting in LIBRARY_SETTINGS), key=len)


def result(library: str, engine: str, second_order: bool) -> BenchmarkResult:
    return BenchmarkResult(
        library, engine, second_order, 12345.67, (12345.67, 12999.99), 0.1, 12.34, (1.0, 2.0), 12345.6, 1234.5, 99.9
    )


def time_tables() -> None:
    names = [*((OURS, engine) for engine in (*ENGINES, "unroll, plain")), (BY_HAND, "")]
    print_results(TITLE, [result(*name, order) for name in names for order in (True, False)], 1234.5, "learn2learn")


def breakdown() -> None:
    shares = dict.fromkeys((DATA, FORWARD, GRADIENT, SECOND_ORDER, OPTIMISER), 1.0)
    print_time_breakdown({setting.name: shares for setting in LIBRARY_SETTINGS})


def engine_tables() -> None:
    setting: EngineBenchmark = max(ENGINE_SETTINGS, key=lambda s: len(s.steps))
    costs = [
        EngineCost(engine, True, chunk, every, steps, 12345.6, 12345.6, (1.0, 2.0), 123.45)
        for engine in ENGINES
        for chunk, every in ((None, 1), (1, 1), (4, 7))
        for steps in setting.steps
    ]
    print_engine_costs(setting, costs, 4096)


def slopes() -> None:
    values = (1234.5, 12345.6)
    line = SweepSeries(f"{OURS} unroll, second order", (1, 128), values, ((1, 2), (1, 2)), values, -1.23, -1.23)
    print_slopes({sweep.axis: [line] for sweep in SWEEPS})


def float32_table() -> None:
    setting: MetaStepSpec = FLOAT32_SETTINGS[-1]
    names = [*(f"{OURS} {engine}" for engine in ENGINES), BY_HAND]
    print_errors(
        setting, [Float32Error(setting.name, "stride", True, True, name, 1e-6, 12.34, 20, (1e-6,)) for name in names]
    )


def scaling_table() -> None:
    row = {"processes": 2, "threads": 1, "meta_step_ms": 12345.6, "meta_steps_per_s": 123.4}
    rows = [row | {"speed_up": 1.234, "efficiency": 0.9}]
    print_summary({"tasks": 32, "all_reduce_ms": 12.3, "gradient_bytes": 4e6, "rows": rows})


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich, "_console", Console(width=300))  # so that nothing is folded to fit


@pytest.mark.parametrize(
    "show", [time_tables, breakdown, engine_tables, slopes, float32_table, scaling_table], ids=lambda f: f.__name__
)
def test_tables_fit_into_80_columns(show: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    show()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4
    assert max(map(len, lines)) <= 80, "\n".join(lines)
