"""The sweeps' file and plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metalearn.commands.benchmark import sweeps
from metalearn.commands.benchmark.methods import DisagreementError, check_gradients_equal
from metalearn.commands.benchmark.settings import SWEEPS, Sweep
from metalearn.commands.benchmark.sweeps import run_sweeps
from metalearn.core.errors import RunError
from tests.commands.benchmark.factories import TINY, config


def test_file_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sweeps, "SWEEPS", (Sweep("tasks", "tasks T", TINY, (1, 2, 4)),))
    run_sweeps(config("bench.kind=sweeps"), tmp_path)
    lines = json.loads((tmp_path / "benchmark.json").read_text())["sweeps"]["tasks"]["lines"]
    assert [line["name"] for line in lines[:2]] == ["metalearn unroll, second order", "metalearn unroll, first order"]
    assert len(lines) == 3
    assert all(len(line["median_ms"]) == len(line["quartiles_ms"]) == 3 for line in lines)
    assert 0.5 < lines[0]["slope_mib"] <= 1, "memory grows with the tasks that are held at once"
    assert "p of time" in capsys.readouterr().out
    with Image.open(tmp_path / "sweep-tasks.png") as plot:
        assert plot.width > 600


def test_other_sweeps_are_measured_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "SWEEPS", (Sweep("width", "w", TINY, (3, 4)), Sweep("tasks", "T", TINY, (1, 2))))

    def fail_at_width_3(found: Any, module: Any, batches: Any) -> Any:
        if module.head.in_features == 3:
            raise DisagreementError("one of them is wrong")
        return check_gradients_equal(found, module, batches)

    monkeypatch.setattr(sweeps, "check_gradients_equal", fail_at_width_3)
    with pytest.raises(RunError, match=r"^1 of 2 settings could not be timed.*\nwidth: one of them is wrong$"):
        run_sweeps(config("bench.kind=sweeps"), tmp_path)
    report = json.loads((tmp_path / "benchmark.json").read_text())["sweeps"]
    assert report["width"]["failed"] == "one of them is wrong"
    assert report["tasks"]["lines"]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_sweep_settings_differ_in_one_field(sweep: Sweep) -> None:
    for setting, value in zip(sweep.settings(), sweep.values, strict=True):
        assert getattr(setting, sweep.name) == value
        assert replace(setting, name="base", **{sweep.name: getattr(sweep.base, sweep.name)}) == sweep.base
    assert len(set(sweep.values)) > 2
