"""The proof proves something: a wrong engine is caught and named, whatever is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from rich.console import Console

from metalearn import Episodes, InnerLoop, MetaGradient, Params
from metalearn.commands.verify import run as verification
from metalearn.commands.verify.cases import SUBJECTS, Case, NumericSetting
from metalearn.commands.verify.comparisons import Comparison, compare
from metalearn.commands.verify.run import run_verification, verdict
from metalearn.config.commands_schema import VerifyConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.core.errors import ConfigError
from metalearn.core.types import Forward, Loss
from metalearn.metagrad import ENGINES, Engine
from metalearn.metagrad.baselines.installed import PEERS, installed_peers
from metalearn.metagrad.unroll import unroll
from tests.commands.test_commands import command
from tests.conftest import REPO

MLP_ALONE = tuple(subject for subject in SUBJECTS if subject.name == "mlp")
ON_CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no line is broken where a test looks for it."""
    monkeypatch.setattr(rich, "_console", Console(width=200))


def configured(*overrides: str) -> VerifyConfig:
    return to_dataclass(compose("verify", ["run.device=cpu", *overrides]), VerifyConfig)


def reduced(output_dir: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[bool, dict[str, Any]]:
    """The verdict and verify.json, of the mlp alone with K=1."""
    monkeypatch.setattr(verification, "SUBJECTS", MLP_ALONE)
    right = run_verification(configured("verify.steps=[1]", *overrides), output_dir)
    report: dict[str, Any] = json.loads((output_dir / "verify.json").read_text())
    assert report["right"] == right
    return right, report


def scaled(factor: float) -> Engine:
    def engine(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
        result = unroll(forward, params, episodes, inner, loss)
        return dataclasses.replace(result, grads={name: factor * g for name, g in result.grads.items()})

    return engine


def first_order(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    return unroll(forward, params, episodes, dataclasses.replace(inner, second_order=False), loss)


def second_order(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    return unroll(forward, params, episodes, dataclasses.replace(inner, second_order=True), loss)


def raises(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    raise RuntimeError("no engine today")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_engines_are_right(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, report = reduced(tmp_path, monkeypatch, f"run.dtype={dtype}")
    assert right
    out = capsys.readouterr().out
    peers, missing = installed_peers()
    assert report["not_compared"] == missing
    # In each order: checkpoint and adjoint against unroll; all three against the truth and every other library.
    assert len(report["comparisons"]) == 2 * (2 + 3 * (1 + len(peers)))
    assert f"{len(report['comparisons'])} comparisons, all within their bounds" in out
    assert report["dtype"] == dtype
    assert report["machine"]["torch"] == report["torch"] == torch.__version__
    for entry in report["comparisons"]:
        assert entry["holds"]
        assert 0 <= entry["error"] <= entry["bound"] <= (1e-6 if dtype == "float64" else 1e-4)
        assert entry["seconds"] > 0
    assert {"mlp 1st 1", "mlp 2nd 1"} <= {line.strip("│ ").split("│")[0].strip() for line in out.splitlines()}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_subject_has_its_references(subject: Any) -> None:
    case = Case(subject, second_order=True, steps=2)
    found = compare(case, NumericSetting(torch.float64, ON_CPU, seed=3), {})
    assert all(comparison.holds for comparison in found), found
    differenced = set() if subject.stopped else set(ENGINES)  # what is stopped is no derivative of the loss
    assert {c.engine for c in found if c.reference == "differences"} == differenced
    expected = {"checkpoint", "adjoint"} if subject.task_chunk is None and not subject.random else set(ENGINES)
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
def test_a_wrong_engine_is_caught_and_its_row_named(
    engine: Engine,
    rows: set[str],
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(verification, "PEERS", {})  # the engines alone must suffice
    monkeypatch.setitem(ENGINES, wrong, engine)
    right, report = reduced(tmp_path, monkeypatch)
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
def test_differences_alone_catch_the_wrong_order(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, wrong, first_order)
    found = compare(Case(MLP_ALONE[0], second_order=True, steps=1), NumericSetting(torch.float64, ON_CPU, seed=0), {})
    held = {c.engine: c for c in found if c.reference == "differences"}
    error = held[wrong].error
    assert error is not None
    assert error > 1e-3, "the orders differ by far more than the bound of 1e-6"
    assert all(c.holds == (c.engine != wrong) for c in held.values())


def test_a_case_that_cannot_be_made_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> torch.nn.Module:
        raise MemoryError("too large")

    subjects = (dataclasses.replace(MLP_ALONE[0], name="huge", module=broken), *MLP_ALONE)
    monkeypatch.setattr(verification, "SUBJECTS", subjects)
    monkeypatch.setattr(verification, "PEERS", {})
    assert not run_verification(configured("verify.steps=[1]"), tmp_path)
    out = capsys.readouterr().out
    assert "FAILED huge, second order, K=1: it raised: MemoryError: too large" in out
    report = json.loads((tmp_path / "verify.json").read_text())
    assert {entry["case"] for entry in report["comparisons"] if entry["holds"]} == {
        "mlp, first order, K=1",
        "mlp, second order, K=1",
    }


def test_a_library_that_raises_fails_its_comparisons_alone() -> None:
    def broken(*_: object) -> MetaGradient:
        raise RuntimeError("no library today")

    case = Case(MLP_ALONE[0], second_order=True, steps=1)
    found = compare(case, NumericSetting(torch.float64, ON_CPU, seed=0), {"theirs": broken})
    failed = [comparison for comparison in found if not comparison.holds]
    assert {(c.engine, c.reference) for c in failed} == {(engine, "theirs") for engine in ENGINES}
    assert all(c.message == "the reference raised RuntimeError: no library today" for c in failed)


def test_a_missing_library_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "learn2learn.algorithms", None)
    for module in PEERS.values():
        monkeypatch.setitem(sys.modules, module, None)  # so that importing it says that there is none
        monkeypatch.delitem(sys.modules, f"metalearn.metagrad.baselines.{module}", raising=False)
    right, report = reduced(tmp_path, monkeypatch)
    assert right
    assert report["not_compared"] == dict.fromkeys(PEERS, "not installed")
    out = capsys.readouterr().out
    assert out.count("absent") == 2 * len(PEERS)  # where the bounds of both orders would stand
    for name in PEERS:
        assert f"{name}: not installed" in out


def test_a_library_that_cannot_be_imported_is_no_wrong_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "PEERS", {"json": "json"})  # there is no metalearn.metagrad.baselines.json
    right, report = reduced(tmp_path, monkeypatch)
    assert right
    assert "json: cannot be imported (No module named 'metalearn.metagrad.baselines.json')" in capsys.readouterr().out
    assert set(report["not_compared"]) == {"json"}


def test_the_worst_is_in_relation_to_its_bound() -> None:
    def comparison(error: float, bound: float) -> Comparison:
        return Comparison("case", "adjoint", "unroll", bound, 0.1, error)

    small, large = comparison(5e-10, 1e-9), comparison(1e-8, 1e-6)
    assert verdict([large, small]).endswith("at 0.5 times its bound.")
    assert "1 FAILED" in verdict([large, small, comparison(float("nan"), 1)])
    assert comparison(1e-9, 1e-9).holds
    assert not comparison(1.1e-9, 1e-9).holds


def test_settings_of_the_process_are_left_alone() -> None:
    places: list[Callable[[], object]] = [
        lambda: torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # made at run time
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.get_rng_state().tolist(),
        torch.get_num_threads,
    ]
    before = [read() for read in places]
    compare(Case(MLP_ALONE[0], second_order=True, steps=1), NumericSetting(torch.float32, ON_CPU, seed=7), {})
    assert [read() for read in places] == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.dtype=float16", r"run\.dtype=float16: must be one of float64, float32"),
        ("run.device=gpu", r"run\.device=gpu: must be auto, cpu, cuda or cuda:N"),
        ("verify.steps=[]", r"verify\.steps=\[\]: must be one or more whole numbers, at least 1"),
        ("verify.steps=[0,1]", r"verify\.steps=\[0, 1\]: must be one or more whole numbers, at least 1"),
        ("verify.stps=[1]", r"verify\.stps=\[1\]: there is no such key\. Did you mean verify\.steps\?"),
    ],
)
def test_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(override)


BROKEN = """
import runpy, sys
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.installed import PEERS, installed_peers
from metalearn.runs import verification
from tests.commands.test_verify import MLP_ALONE, first_order
verification.SUBJECTS, verification.PEERS = MLP_ALONE, {}
if sys.argv.pop(1) == "broken":
    ENGINES["adjoint"] = first_order
runpy.run_path("scripts/verify.py", run_name="__main__")
"""


@pytest.mark.parametrize(("engines", "code"), [("sound", 0), ("broken", 1)])
def test_exit_code(engines: str, code: int, tmp_path: Path) -> None:
    arguments = ["run.device=cpu", "verify.steps=[1]", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, engines, *arguments], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("FAILED mlp, second order, K=1: adjoint against unroll" in done.stdout) == bool(code)
    assert (tmp_path / "verify.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_everything(dtype: str, tmp_path: Path) -> None:
    done = command("verify.py", f"run.dtype={dtype}", "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    cases = {entry["case"] for entry in report["comparisons"]}
    assert len(cases) == len(SUBJECTS) * 2 * 3
    assert "all within their bounds" in done.stdout
