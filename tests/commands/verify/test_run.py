"""``metalearn verify`` passes on the engines, and fails and names an engine that is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn import Episodes, InnerLoop, MetaGradient, Params
from metalearn.commands.verify import run as verification
from metalearn.commands.verify.cases import MODEL_CASES, Case, NumericSetting
from metalearn.commands.verify.comparisons import Comparison, compare
from metalearn.commands.verify.run import run_verification, verdict
from metalearn.core.types import Forward, Loss
from metalearn.metagrad import ENGINES, Engine
from metalearn.metagrad.baselines.common import PEERS, installed_peers
from metalearn.metagrad.unroll import unroll
from tests.commands.process import command, python
from tests.commands.verify.factories import CPU, MLP_ONLY, config_with, first_order, scaled, verify_mlp
from tests.paths import REPO


def second_order(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    return unroll(forward, params, episodes, dataclasses.replace(inner, second_order=True), loss)


def raises(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    raise RuntimeError("no engine today")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_comparisons_pass_for_the_engines(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, report = verify_mlp(tmp_path, monkeypatch, f"run.dtype={dtype}")
    assert right
    out = capsys.readouterr().out
    peers, missing = installed_peers()
    assert report["not_compared"] == missing
    # In each order: checkpoint and adjoint against unroll; all three against the truth, the loop and libraries.
    assert len(report["comparisons"]) == 2 * (2 + 3 * (2 + len(peers)))
    assert f"{len(report['comparisons'])} comparisons, all within their bounds" in out
    assert report["dtype"] == dtype
    assert report["machine"]["torch"] == report["torch"] == torch.__version__
    for entry in report["comparisons"]:
        assert entry["holds"]
        assert 0 <= entry["error"] <= entry["bound"] <= (1e-6 if dtype == "float64" else 1e-4)
        assert entry["seconds"] > 0
    assert {"mlp 1st", "mlp 2nd"} <= {line.strip("│ ").split("│")[0].strip() for line in out.splitlines()}


@pytest.mark.parametrize("model", MODEL_CASES, ids=lambda model: model.name)
def test_model_is_compared_with_its_references(model: Any) -> None:
    case = Case(model, second_order=True, steps=2)
    found = compare(case, NumericSetting(torch.float64, CPU, seed=3), {})
    assert all(comparison.passed for comparison in found), found
    differenced = set() if model.stops_gradient else set(ENGINES)  # a stopped gradient is no derivative
    assert {c.engine for c in found if c.reference == "differences"} == differenced
    assert {c.engine for c in found if c.reference == "by hand"} == (set() if model.is_stochastic else set(ENGINES))
    expected = {"checkpoint", "adjoint"} if model.task_chunk is None and not model.is_stochastic else set(ENGINES)
    assert {c.engine for c in found if c.reference == "unroll"} == expected


@pytest.mark.parametrize("wrong", ENGINES)
@pytest.mark.parametrize(
    ("engine", "rows"),
    [
        (first_order, {"mlp, second order, K=1"}),
        (second_order, {"mlp, first order, K=1"}),
        (scaled(1 + 1e-7), {"mlp, first order, K=1", "mlp, second order, K=1"}),
        (scaled(float("nan")), {"mlp, first order, K=1", "mlp, second order, K=1"}),
        (raises, {"mlp, first order, K=1", "mlp, second order, K=1"}),
    ],
    ids=["first order", "second order", "off by 1e-7", "NaN", "raises"],
)
def test_wrong_engine_fails_in_its_row(
    engine: Engine,
    rows: set[str],
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verification, "PEERS", {})  # without other libraries
    monkeypatch.setitem(ENGINES, wrong, engine)
    right, report = verify_mlp(tmp_path, monkeypatch)
    assert not right
    out = capsys.readouterr().out
    failed = [entry for entry in report["comparisons"] if not entry["holds"]]
    assert {entry["case"] for entry in failed} == rows
    for entry in failed:
        assert f"FAILED {entry['case']}: {entry['engine']} against {entry['reference']}: " in out
        assert wrong in (entry["engine"], entry["reference"]) or wrong == "unroll"
    assert f"{len(failed)} FAILED" in out
    if engine is raises:
        assert "RuntimeError: no engine today" in out
        assert all(entry["error"] is None for entry in failed)


@pytest.mark.parametrize("wrong", ENGINES)
def test_central_differences_detect_the_wrong_order(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, wrong, first_order)
    found = compare(Case(MLP_ONLY[0], second_order=True, steps=1), NumericSetting(torch.float64, CPU, seed=0), {})
    by_engine = {c.engine: c for c in found if c.reference == "differences"}
    error = by_engine[wrong].error
    assert error is not None
    assert error > 1e-3, "the orders differ by far more than the bound of 1e-6"
    assert all(c.passed == (c.engine != wrong) for c in by_engine.values())


def test_other_cases_run_when_a_model_cannot_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> torch.nn.Module:
        raise MemoryError("too large")

    models = (dataclasses.replace(MLP_ONLY[0], name="huge", module=broken), *MLP_ONLY)
    monkeypatch.setattr(verification, "MODEL_CASES", models)
    monkeypatch.setattr(verification, "PEERS", {})
    assert not run_verification(config_with("verify.steps=[1]"), tmp_path)
    out = capsys.readouterr().out
    assert "FAILED huge, second order, K=1: it raised: MemoryError: too large" in out
    report = json.loads((tmp_path / "verify.json").read_text())
    assert {entry["case"] for entry in report["comparisons"] if entry["holds"]} == {
        "mlp, first order, K=1",
        "mlp, second order, K=1",
    }


def test_only_its_comparisons_fail_when_a_library_raises() -> None:
    def broken(*_: object, **__: object) -> MetaGradient:
        raise RuntimeError("no library today")

    case = Case(MLP_ONLY[0], second_order=True, steps=1)
    found = compare(case, NumericSetting(torch.float64, CPU, seed=0), {"theirs": broken})
    failed = [comparison for comparison in found if not comparison.passed]
    assert {(c.engine, c.reference) for c in failed} == {(engine, "theirs") for engine in ENGINES}
    assert all(c.message == "the reference raised RuntimeError: no library today" for c in failed)


def test_missing_library_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn.algorithms", None)
    for module in PEERS.values():
        monkeypatch.setitem(sys.modules, module, None)  # so that importing it fails
        monkeypatch.delitem(sys.modules, f"metalearn.metagrad.baselines.{module}", raising=False)
    right, report = verify_mlp(tmp_path, monkeypatch)
    assert right
    assert report["not_compared"] == dict.fromkeys(PEERS, "not installed")
    out = capsys.readouterr().out
    assert out.count("absent") == 2 * len(PEERS)  # where the bounds of both orders would stand
    for name in PEERS:
        assert f"{name}: not installed" in out


def test_verification_passes_when_a_library_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "PEERS", {"json": "json"})  # there is no metalearn.metagrad.baselines.json
    right, report = verify_mlp(tmp_path, monkeypatch)
    assert right
    assert "json: cannot be imported (No module named 'metalearn.metagrad.baselines.json')" in capsys.readouterr().out
    assert set(report["not_compared"]) == {"json"}


def test_worst_error_is_relative_to_its_tolerance() -> None:
    def comparison(error: float, tolerance: float) -> Comparison:
        return Comparison("case", "adjoint", "unroll", tolerance, 0.1, error)

    small, large = comparison(5e-10, 1e-9), comparison(1e-8, 1e-6)
    assert verdict([large, small]).endswith("at 0.5 times its bound.")
    assert "1 FAILED" in verdict([large, small, comparison(float("nan"), 1)])
    assert comparison(1e-9, 1e-9).passed
    assert not comparison(1.1e-9, 1e-9).passed


def test_compare_restores_process_settings() -> None:
    places: list[Callable[[], object]] = [
        lambda: torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # made at run time
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.get_rng_state().tolist(),
        torch.get_num_threads,
    ]
    before = [read() for read in places]
    compare(Case(MLP_ONLY[0], second_order=True, steps=1), NumericSetting(torch.float32, CPU, seed=7), {})
    assert [read() for read in places] == before


PROGRAM = """
import runpy, sys
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.common import PEERS, installed_peers
from metalearn.commands.verify import run as verification
from tests.commands.verify.factories import MLP_ONLY, first_order
verification.MODEL_CASES, verification.PEERS = MLP_ONLY, {}
if sys.argv.pop(1) == "broken":
    ENGINES["adjoint"] = first_order
runpy.run_path("scripts/verify.py", run_name="__main__")
"""


@pytest.mark.parametrize(("engines", "code"), [("sound", 0), ("broken", 1)])
def test_exit_code_is_1_when_an_engine_is_wrong(engines: str, code: int, tmp_path: Path) -> None:
    arguments = ["run.device=cpu", "verify.steps=[1]", f"hydra.run.dir={tmp_path}"]
    done = python("-c", PROGRAM, engines, *arguments, cwd=REPO, code=code, PYTHONPATH=str(REPO))
    assert ("FAILED mlp, second order, K=1: adjoint against unroll" in done.stdout) == bool(code)
    assert (tmp_path / "verify.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_command_passes_on_all_cases(dtype: str, tmp_path: Path) -> None:
    done = command("verify.py", f"run.dtype={dtype}", "hydra.run.dir=out", cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    cases = {entry["case"] for entry in report["comparisons"]}
    assert len(cases) == len(MODEL_CASES) * 2 * 3
    assert "all within their bounds" in done.stdout
