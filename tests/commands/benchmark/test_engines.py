"""The table of engines: its variants, file and plot, and its error if engines disagree."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from metalearn import metagrad
from metalearn.commands.benchmark import engines as engine_table
from metalearn.commands.benchmark.engines import run_engine_table, variants
from metalearn.commands.benchmark.settings import EngineBenchmark, EngineCost
from metalearn.core.errors import RunError
from metalearn.metagrad.unroll import unroll
from tests.commands.benchmark import factories

TINY = EngineBenchmark("5way_1shot", 3, 1, 1, 5, 4, steps=(1, 4), timed=(4,))
OVERRIDES = ["bench.kind=engines", "bench.setting=5way_1shot"]


def test_variants_include_first_order_and_chunks() -> None:
    names = [
        EngineCost(v.engine, v.second_order, v.task_chunk, v.snapshot_every, 4, 0.0).name for v in variants(TINY, 4)
    ]
    assert names[:4] == ["first order", "unroll", "checkpoint", "adjoint"]
    assert {f"{n}, 1 task at a time" for n in names[:4]} < set(names)
    assert {"checkpoint, 4 tasks at a time", "adjoint, 4 tasks at a time"} < set(names)
    assert len(names) == len(set(names)) == 12


def test_file_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine_table, "ENGINE_SETTINGS", (TINY,))
    run_engine_table(factories.config(*OVERRIDES, "bench.memory_limit_mib=0.9"), tmp_path)
    report = json.loads((tmp_path / "benchmark.json").read_text())
    rows = [EngineCost(**row) for row in report["settings"]["5way_1shot"]["rows"]]
    at = {(row.name, row.steps): row for row in rows}
    assert at["unroll", 4].peak_mib is None, "over the limit"
    assert at["unroll", 4].median_ms is None
    assert at["first order", 4].peak_mib == pytest.approx(at["first order", 1].peak_mib, rel=0.01)
    adjoint = at["adjoint, 4 tasks at a time", 4]
    assert adjoint.peak_mib
    assert adjoint.median_ms
    assert at["adjoint, 1 task at a time", 4].median_ms is None
    assert report["limit_mib"] == 0.9
    assert "over: above 0.9" in capsys.readouterr().out
    with Image.open(tmp_path / "memory-5way_1shot.png") as plot:
        assert plot.width > 600


def test_table_raises_when_engines_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_table, "ENGINE_SETTINGS", (TINY,))
    monkeypatch.setitem(
        metagrad.ENGINES,
        "adjoint",
        lambda forward, params, episodes, inner, loss: unroll(
            forward, params, episodes, dataclasses.replace(inner, second_order=False), loss
        ),
    )
    with pytest.raises(RunError, match=r"engine='adjoint'.* differs from unroll by .*; nothing was timed"):
        run_engine_table(factories.config(*OVERRIDES), tmp_path)
