"""The benchmark's own arithmetic, and that it refuses to time contenders that disagree. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from metalearn import Episodes, InnerLoop, MetaGradient
from metalearn.errors import RunError
from metalearn.models import Conv4
from metalearn.runs import benchmark
from metalearn.runs.benchmark import Contender, check_equal, contenders, run_benchmark, summarise
from metalearn.runs.checks import check
from metalearn.runs.config import compose, typed
from metalearn.runs.config_files import settle_data
from metalearn.runs.schema_commands import BenchmarkConfig
from tests.conftest import image_episodes

pytestmark = pytest.mark.usefixtures("learn2learn_installed")


def test_contenders_agree() -> None:
    found = contenders(InnerLoop(lr=0.1, steps=2))
    assert [(c.library, c.engine, c.second_order) for c in found] == [
        ("metalearn", "unroll", True),
        ("metalearn", "checkpoint", True),
        ("metalearn", "adjoint", True),
        ("learn2learn", "", True),
        ("metalearn", "unroll", False),
        ("learn2learn", "", False),
    ]
    check_equal(found, Conv4(3, width=4), image_episodes())


def test_a_wrong_meta_gradient_is_not_timed() -> None:
    found = contenders(InnerLoop(lr=0.1, steps=2))

    def wrong(module: nn.Module, episodes: Episodes) -> MetaGradient:
        return found[-2].step(module, episodes)  # the first order's

    cheat = Contender("cheat", "fast", second_order=True, step=wrong)
    with pytest.raises(RunError, match=r"cheat fast, second order differs from metalearn unroll, second order by .*e-"):
        check_equal([*found, cheat], Conv4(3, width=4), image_episodes())


def test_ratio_is_the_median_of_ratios_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_peak_mib", lambda *_: 1.0)
    found = contenders(InnerLoop(lr=0.1, steps=1))[2:4]
    times = {found[0].name: [1.0, 2.0, 30.0], found[1].name: [2.0, 4.0, 10.0]}
    ours, theirs = summarise(found, times, nn.Identity(), image_episodes())
    assert ours.ratio_to_learn2learn == 0.5
    assert theirs.ratio_to_learn2learn == 1
    assert ours.median_ms == 2


def test_report_is_written(tmp_path: Path) -> None:
    small = ["data=glyphs", "data.classes=50", "model.width=4", "task.meta_batch=2", "bench.rounds=2"]
    config = typed(compose("benchmark", small), BenchmarkConfig)
    check(config)
    run_benchmark(settle_data(config), tmp_path)
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(report["rows"]) == 6
    assert all(row["median_ms"] > 0 and row["peak_mib"] > 0 for row in report["rows"])
    assert report["machine"]["torch"] == torch.__version__
