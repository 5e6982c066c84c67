"""The benchmark's files, tables and plot, with and without other libraries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from PIL import Image
from rich.console import Console

from metalearn.commands.benchmark import methods
from metalearn.commands.benchmark import run as benchmark
from metalearn.commands.benchmark.methods import BY_HAND, LEARN2LEARN, DisagreementError, check_gradients_equal
from metalearn.commands.benchmark.run import run_benchmark
from metalearn.core.errors import ConfigError, RunError
from metalearn.data.splits import ImageSplits
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.common import PEERS, Peer, installed_peers
from tests.commands.benchmark.factories import CPU, TINY, config


@pytest.fixture(autouse=True)
def _small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a small setting and small matrices, and keep the lines that tests search for unbroken."""
    monkeypatch.setattr(benchmark, "LIBRARY_SETTINGS", (TINY,))
    monkeypatch.setattr(benchmark, "peak_matmul_flops", lambda _: 1e9)
    monkeypatch.setattr(rich, "_console", Console(width=200))


def run_and_load(folder: Path, *overrides: str) -> dict[str, Any]:
    run_benchmark(config(*overrides), folder)
    report: dict[str, Any] = json.loads((folder / "benchmark.json").read_text())
    return report


def test_report_of_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_and_load(tmp_path, "bench.setting=5way_1shot")
    peers, _ = installed_peers()
    setting = report["settings"]["5way_1shot"]
    assert len(setting["rows"]) == len(ENGINES) + 1 + 2 * (1 + len(peers))
    for row in setting["rows"]:
        needed = setting["needed_gflop"]["second_order" if row["second_order"] else "first_order"]
        assert row["median_ms"] * row["gflops"] == pytest.approx(1000 * needed)
        assert row["percent_of_peak"] == pytest.approx(100 * row["gflops"])  # the peak was set to 1 GFLOP/s
        assert row["peak_mib"] > 0
    baseline_speeds = [row["speed"] for row in setting["rows"] if row["library"] == report["yardstick"]]
    assert baseline_speeds == [1.0, 1.0]
    assert sum(setting["parts"]["share"].values()) == pytest.approx(1)
    assert setting["largest_difference"]["float64"] < 1e-9
    assert report["machine"]["torch"] == torch.__version__
    out = capsys.readouterr().out
    assert ">1 is faster" in out
    assert "second-order pass" in out
    with Image.open(tmp_path / "speed.png") as plot:
        assert plot.width > 600


def test_other_settings_are_timed_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LIBRARY_SETTINGS", (replace(TINY, name="20way_1shot", ways=4), TINY))

    def fail_at_four_ways(found: Any, module: Any, batches: Any) -> Any:
        if module.head.out_features == 4:
            raise DisagreementError("one of them is wrong")
        return check_gradients_equal(found, module, batches)

    monkeypatch.setattr(benchmark, "check_gradients_equal", fail_at_four_ways)
    with pytest.raises(RunError, match=r"^1 of 2 settings could not be timed.*\n20way_1shot: one of them is wrong$"):
        run_and_load(tmp_path)
    settings = json.loads((tmp_path / "benchmark.json").read_text())["settings"]
    assert settings["20way_1shot"]["failed"] == "one of them is wrong"
    assert settings["5way_1shot"]["rows"]


def test_configured_meta_step_is_timed(tmp_path: Path) -> None:
    small = ["bench.setting=configured", "task.ways=3", "task.meta_batch=2", "model=mlp", "model.hidden=[4]"]
    report = run_and_load(tmp_path, *small)
    assert report["settings"]["configured"]["task"]["ways"] == 3
    assert report["settings"]["configured"]["model"]["hidden"] == [4]


def test_baseline_is_hand_written_loop_when_no_library_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(methods, "installed_peers", lambda: ({}, dict.fromkeys(PEERS, "not installed")))
    report = run_and_load(tmp_path)
    assert report["yardstick"] == BY_HAND
    assert {row["library"] for row in report["settings"]["5way_1shot"]["rows"]} == {"metalearn", BY_HAND}
    for name in PEERS:
        assert f"{name} is left out: not installed" in caplog.text
    assert caplog.text.count("pip install -r requirements-peers.txt") == len(PEERS)


def test_baseline_is_learn2learn_when_installed() -> None:
    both: dict[str, Peer] = dict.fromkeys((BY_HAND, LEARN2LEARN), lambda *_, **__: NotImplemented)
    assert methods.baseline(both) == LEARN2LEARN


def test_case_raises_when_data_has_too_few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(2, 20, 1, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(benchmark, "load_data", lambda _: ImageSplits("glyphs", images, images, images))
    with pytest.raises(ConfigError, match=r"takes 3 classes a task.*has 2 to train on.*data\.classes"):
        next(benchmark.cases(config(), CPU))
