"""The four kinds of benchmark: their checks, files, tables and plots."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from metalearn import metagrad
from metalearn.commands.benchmark import engines, float32, methods, sweeps
from metalearn.commands.benchmark import report as reports
from metalearn.commands.benchmark import run as benchmark
from metalearn.commands.benchmark.measure import random_meta_step
from metalearn.commands.benchmark.methods import (
    BY_HAND,
    JAX,
    LEARN2LEARN,
    OURS,
    PLAIN,
    TORCH_FUNC,
    DisagreementError,
    check_gradients_equal,
)
from metalearn.commands.benchmark.settings import (
    LIBRARY_SETTINGS,
    SETTINGS_OF,
    SWEEPS,
    EngineBenchmark,
    EngineCost,
    MetaStepSpec,
    Sweep,
    check_benchmark,
)
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.text import plural
from metalearn.data.splits import ImageSplits
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.common import PEERS, Baseline, installed_peers
from metalearn.metagrad.unroll import unroll
from metalearn.models import MLP, Conv4, ResNet12
from tests.commands.benchmark.factories import CPU, TINY, config

TINY_ENGINES = EngineBenchmark("5way_1shot", 3, 1, 1, 5, 4, steps=(1, 4), timed=(4,))
OF_ENGINES = ("bench.kind=engines", "bench.setting=5way_1shot")


@pytest.fixture(autouse=True)
def _small_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small settings and small matrices, and keep the lines that tests search for unbroken."""
    monkeypatch.setattr(benchmark, "LIBRARY_SETTINGS", (TINY,))
    monkeypatch.setattr(float32, "FLOAT32_SETTINGS", (TINY,))
    monkeypatch.setattr(engines, "ENGINE_SETTINGS", (TINY_ENGINES,))
    monkeypatch.setattr(sweeps, "SWEEPS", (Sweep("tasks", "tasks T", TINY, (1, 2, 4)),))
    monkeypatch.setattr(benchmark, "peak_matmul_flops", lambda _: 1e9)
    monkeypatch.setattr(reports, "configure_malloc", lambda: False)  # it would last for later tests
    monkeypatch.setattr(rich, "_console", Console(width=200))
    monkeypatch.setattr(methods, "installed_peers", peers_without_jax)


def peers_without_jax(modules: Any = PEERS, package: str = "") -> Any:
    """Return the installed peers of a training: JAX, which compiles for minutes, is tested in ``test_jax.py``."""
    return installed_peers(modules) if modules is PEERS else ({}, {})


def run_and_load(
    folder: Path, *overrides: str, run: Callable[[BenchmarkConfig, Path], None] = benchmark.run_benchmark
) -> dict[str, Any]:
    run(config(*overrides), folder)
    report: dict[str, Any] = json.loads((folder / "benchmark.json").read_text())
    for plot in folder.glob("*.png"):
        with Image.open(plot) as image:
            assert image.width > 600
    return report


def plot_names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.png")]


def test_report_of_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_and_load(tmp_path, "bench.setting=5way_1shot")
    peers, _ = installed_peers()
    setting = report["settings"]["5way_1shot"]
    assert len(setting["rows"]) == len(ENGINES) + 1 + 2 * (2 + len(peers))
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
    assert ">1 is faster" in " ".join(out.split())
    assert setting["other_work"]["others_cores"] >= 0
    assert f"torch on {plural(torch.get_num_threads(), 'thread')}; other work took" in out
    assert "Where the time of a second-order meta-step goes" in out
    assert plot_names(tmp_path) == ["speed.png"]


def test_plain_call_is_timed_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reports, "configure_malloc", lambda: True)  # only says so
    report = run_and_load(tmp_path)
    rows = report["settings"]["5way_1shot"]["rows"]
    plain = [row for row in rows if row["engine"] == PLAIN]
    assert [(row["library"], row["second_order"]) for row in plain] == [(OURS, True), (OURS, False)]
    assert all(row["median_ms"] > 0 and row["peak_mib"] is None for row in plain)
    assert report["configure_malloc"] is True
    assert "plain: without metalearn.configure_malloc()" in " ".join(capsys.readouterr().out.split())


def test_threads_are_those_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    reports.Report(config("run.threads=3"), tmp_path, "settings")
    reports.Report(config(), tmp_path, "settings")
    assert numbers == [3]


@pytest.mark.parametrize(
    ("module", "constant", "settings", "run", "kind"),
    [
        (benchmark, "LIBRARY_SETTINGS", (replace(TINY, name="bad", ways=4), TINY), benchmark.run_benchmark, "peers"),
        (sweeps, "SWEEPS", (Sweep("ways", "N", TINY, (4, 3)), Sweep("tasks", "T", TINY, (1, 2))), sweeps.run_sweeps,
         "sweeps"),
    ],
    ids=["peers", "sweeps"],
)  # fmt: skip
def test_others_are_timed_when_a_setting_fails(
    module: Any, constant: str, settings: Any, run: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_four_ways(found: Any, module: Any, batches: Any) -> Any:
        if module.head.out_features == 4:
            raise DisagreementError("one of them is wrong")
        return check_gradients_equal(found, module, batches)

    monkeypatch.setattr(module, constant, settings)
    monkeypatch.setattr(module, "check_gradients_equal", fail_at_four_ways)
    bad, good = (setting.name for setting in settings)
    with pytest.raises(RunError, match=rf"^1 of 2 settings could not be timed.*\n{bad}: one of them is wrong$"):
        run(config(f"bench.kind={kind}"), tmp_path)
    report = json.loads((tmp_path / "benchmark.json").read_text())
    entries = report.get("settings") or report["sweeps"]
    assert entries[bad]["failed"] == "one of them is wrong"
    assert entries[good].get("rows") or entries[good]["lines"]


def test_configured_meta_step_is_timed(tmp_path: Path) -> None:
    small = ["bench.setting=configured", "task.ways=3", "task.meta_batch=2", "model=mlp", "model.hidden=[4]"]
    report = run_and_load(tmp_path, *small)
    assert report["settings"]["configured"]["task"]["ways"] == 3
    assert report["settings"]["configured"]["model"]["hidden"] == [4]


def test_baseline_is_hand_written_loop_when_no_library_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        methods, "installed_peers", lambda modules=PEERS, _="": ({}, dict.fromkeys(modules, "not installed"))
    )
    report = run_and_load(tmp_path)
    assert report["yardstick"] == BY_HAND
    assert {row["library"] for row in report["settings"]["5way_1shot"]["rows"]} == {"metalearn", BY_HAND, TORCH_FUNC}
    for name in (*PEERS, JAX):
        assert f"{name} is left out: not installed" in caplog.text
    assert caplog.text.count("pip install -r requirements-peers.txt") == len(PEERS) + 1


def test_baseline_is_learn2learn_when_installed() -> None:
    both: dict[str, Baseline] = dict.fromkeys((BY_HAND, LEARN2LEARN), lambda *_, **__: NotImplemented)
    assert methods.speed_reference(both) == LEARN2LEARN


def test_case_raises_when_data_has_too_few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(2, 20, 1, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(benchmark, "load_data", lambda _: ImageSplits("glyphs", images, images, images))
    with pytest.raises(ConfigError, match=r"takes 3 classes a task.*has 2 to train on.*data\.classes"):
        next(benchmark.cases(config(), CPU))


def test_engine_variants_include_first_order_and_chunks() -> None:
    found = engines.variants(TINY_ENGINES, 4)
    names = [EngineCost(v.engine, v.second_order, v.task_chunk, v.checkpoint_every, 4, 0.0).name for v in found]
    assert names[:4] == ["first order", "unroll", "checkpoint", "adjoint"]
    assert {f"{n}, 1 task at a time" for n in names[:4]} < set(names)
    assert {"checkpoint, 4 tasks at a time", "adjoint, 4 tasks at a time"} < set(names)
    assert len(names) == len(set(names)) == 12


def test_report_of_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_and_load(tmp_path, *OF_ENGINES, "bench.memory_limit_mib=0.9", run=engines.run_engine_table)
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
    assert "over: above 0.9" in " ".join(capsys.readouterr().out.split())
    assert plot_names(tmp_path) == ["memory-5way_1shot.png"]


def test_engine_table_raises_when_engines_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_order(forward: Any, params: Any, episodes: Any, inner: Any, loss: Any) -> Any:
        return unroll(forward, params, episodes, dataclasses.replace(inner, second_order=False), loss)

    monkeypatch.setitem(metagrad.ENGINES, "adjoint", first_order)
    with pytest.raises(RunError, match=r"engine='adjoint'.* differs from unroll by .*; nothing was timed"):
        engines.run_engine_table(config(*OF_ENGINES), tmp_path)


def test_float32_table_has_every_engine_and_the_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("bench.kind=float32", "bench.repeats=3", "run.seed=4")
    report = run_and_load(tmp_path, *overrides, run=float32.run_float32_table)
    assert report["seeds"] == [4, 5, 6]
    rows = {(row["pool"], row["biases"], row["second_order"], row["who"]): row for row in report["rows"]}
    names = {True: {*(f"{OURS} {engine}" for engine in ENGINES), BY_HAND}, False: {f"{OURS} unroll", BY_HAND}}
    for pool in ("stride", "max"):
        for biases in (False, True):
            for second_order, expected in names.items():
                assert {label for *key, label in rows if key == [pool, biases, second_order]} == expected
    for row in rows.values():
        assert row["median"] == sorted(row["distances"])[1]
        assert 0 < row["median"] < 1e-4
        assert row["times_plain"] > 0
        assert row["far"] == sum(distance > 1e-3 for distance in row["distances"])
    assert "median of 3 seeds" in capsys.readouterr().out


def test_conv4_with_biases_is_not_batched_as_a_whole() -> None:
    module = Conv4(3, width=4, pool="max")
    float32.add_biases(module)
    assert not module.supports_batched_forward()
    assert module(torch.zeros(6, 1, 28, 28)).shape == (6, 3)
    assert len([name for name, _ in module.named_parameters() if name.endswith(".0.bias")]) == 4


def test_report_of_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_and_load(tmp_path, "bench.kind=sweeps", run=sweeps.run_sweeps)["sweeps"]["tasks"]["lines"]
    assert [line["name"] for line in lines[:2]] == ["metalearn unroll, second order", "metalearn unroll, first order"]
    assert len(lines) == 3
    assert all(len(line["median_ms"]) == len(line["quartiles_ms"]) == 3 for line in lines)
    assert 0.5 < lines[0]["slope_mib"] <= 1, "memory grows with the tasks that are held at once"
    assert "How cost grows with the tasks T, 1 to 4" in " ".join(capsys.readouterr().out.split())
    assert plot_names(tmp_path) == ["sweep-tasks.png"]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.name)
def test_sweep_settings_differ_in_one_field(sweep: Sweep) -> None:
    for setting, value in zip(sweep.settings(), sweep.values, strict=True):
        assert getattr(setting, sweep.name) == value
        assert replace(setting, name="base", **{sweep.name: getattr(sweep.base, sweep.name)}) == sweep.base
    assert len(set(sweep.values)) > 2


NETWORKS = {"5way_5shot_max_pool": Conv4, "5way_1shot_mlp": MLP, "5way_1shot_resnet12": ResNet12}


@pytest.mark.parametrize("setting", LIBRARY_SETTINGS, ids=lambda setting: setting.name)
def test_settings_have_the_network_and_images_that_they_name(setting: MetaStepSpec) -> None:
    step = random_meta_step(replace(setting, tasks=1), CPU)
    assert type(step.module) is NETWORKS.get(setting.name, Conv4)
    assert max(len(p) for p in step.module.parameters() if p.ndim > 1) == setting.width * (
        8 if setting.model == "resnet12" else 1
    )
    has_max_pool = any(isinstance(m, nn.MaxPool2d) for m in step.module.modules())
    assert has_max_pool == (setting.name in ("5way_5shot_max_pool", "5way_1shot_resnet12"))
    assert tuple(step.episodes.support_x.shape[2:]) == setting.image
    assert step.module(step.episodes.query_x[0]).shape == (setting.ways * setting.queries, setting.ways)


def test_setting_with_other_images_than_omniglots_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colour = replace(TINY, name="colour", model="mlp", image=(3, 8, 8))
    monkeypatch.setattr(benchmark, "LIBRARY_SETTINGS", (colour,))
    assert run_and_load(tmp_path)["settings"]["colour"]["image"] == [3, 8, 8]


@pytest.mark.parametrize(("kind", "setting", "near"), [("peers", "nope", ""), ("engines", "5way_1shots", "5way_1shot")])
def test_unknown_setting_lists_those_of_the_kind(kind: str, setting: str, near: str) -> None:
    config = to_dataclass(compose("benchmark", [f"bench.kind={kind}", f"bench.setting={setting}"]), BenchmarkConfig)
    meant = f" Did you mean {near}?" if near else ""
    known = ", ".join(SETTINGS_OF[kind])
    message = (
        f"bench.setting={setting}: there is no such setting.{meant} The settings of bench.kind={kind} are {known}."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_benchmark(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bench.setting=5way_5shot"], r"The settings of bench\.kind=peers are all, configured, 5way_1shot"),
        (
            ["bench.kind=sweeps", "bench.setting=configured"],
            r"The settings of bench\.kind=sweeps are all, steps, tasks, ways, width",
        ),
        (["task.ways=4"], r"task\.ways=4: bench\.setting=all defines tasks.*bench\.setting=configured"),
        (["bench.kind=engines", "model=mlp"], r"model\.name=mlp.*bench\.setting=configured"),
    ],
)
def test_config_raises_when_a_key_would_be_ignored(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


def test_configured_setting_accepts_task_and_model() -> None:
    assert config("bench.setting=configured", "task.ways=4", "model=mlp").task.ways == 4
