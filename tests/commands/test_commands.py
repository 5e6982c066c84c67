"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPO

SMALL = [
    "data=glyphs",
    "data.classes=50",
    "model.width=8",
    "task.meta_batch=4",
    "outer.iterations=4",
    "eval.every=2",
    "eval.validation_episodes=4",
    "eval.episodes=8",
]


def environment_of_its_own(**more: str) -> dict[str, str]:
    """One thread, and nothing that the tests' own environment says of data and code."""
    env = {name: value for name, value in os.environ.items() if name not in ("METALEARN_DATA", "PYTHONPATH")}
    return {"OMP_NUM_THREADS": "1", **env, **more}


def command(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "scripts" / script), *arguments],
        cwd=cwd,
        env=environment_of_its_own(**environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_train_from_another_folder_then_evaluate(tmp_path: Path) -> None:
    trained = command("train.py", "inner.second_order=true", *SMALL, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "test accuracy" in trained.stdout
    assert "non-transductive" in trained.stdout
    (metrics_file,) = tmp_path.glob("outputs/glyphs-5w1s/maml-second_order-seed0-*/metrics.json")
    run_dir = metrics_file.parent
    names = {p.name for p in run_dir.iterdir()}
    assert {"config.yaml", "metrics.json", "checkpoints", "train.log"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    metrics = json.loads(metrics_file.read_text())

    tested = command("evaluate.py", f"run.dir={run_dir}", cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr
    (again_file,) = run_dir.glob("evaluations/*/metrics.json")
    again = json.loads(again_file.read_text())
    assert {k: v for k, v in again.items() if k.startswith("test.")} == {
        k: v for k, v in metrics.items() if k.startswith("test.")
    }

    wider = command("evaluate.py", f"run.dir={run_dir}", "eval.queries=3", "hydra.run.dir=wider", cwd=tmp_path)
    assert wider.returncode == 0, wider.stderr
    assert json.loads((tmp_path / "wider" / "metrics.json").read_text())["test.queries"] == 3

    onto = command("evaluate.py", f"run.dir={run_dir}", f"hydra.run.dir={run_dir}", cwd=tmp_path)
    assert onto.returncode == 2
    assert "already holds a run (its config.yaml)" in onto.stderr
    assert json.loads(metrics_file.read_text()) == metrics

    damaged = run_dir / "checkpoints" / "best.pt"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    restored = command("evaluate.py", f"run.dir={run_dir}", "hydra.run.dir=restored", cwd=tmp_path, COLUMNS="400")
    assert restored.returncode == 0, restored.stderr
    said = " ".join(restored.stdout.split())
    assert "best.pt is damaged" in said
    assert "best parameters are taken from the state instead" in said
    restored_metrics = json.loads((tmp_path / "restored" / "metrics.json").read_text())
    assert restored_metrics["test.accuracy"] == metrics["test.accuracy"]

    for state in run_dir.glob("checkpoints/state-*.pt"):
        state.write_bytes(b"")
    refused = command("evaluate.py", f"run.dir={run_dir}", cwd=tmp_path)
    assert refused.returncode == 2
    assert "every checkpoint is damaged" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_run_dir_is_honoured_and_never_shared(tmp_path: Path) -> None:
    first = command("train.py", *SMALL, "hydra.run.dir=mine", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "mine" / "metrics.json").is_file()
    logged = (tmp_path / "mine" / "train.log").read_text()
    second = command("train.py", *SMALL, "hydra.run.dir=mine", cwd=tmp_path)
    assert second.returncode != 0
    assert "mine already holds a run" in second.stderr
    assert (tmp_path / "mine" / "train.log").read_text() == logged
    (tmp_path / "file").touch()
    third = command("train.py", *SMALL, "hydra.run.dir=file", cwd=tmp_path)
    assert third.returncode == 2
    assert "hydra.run.dir=file: this is a file, or lies below one; name a folder" in third.stderr


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "checkpoints", "benchmark.json"])
def test_nothing_of_the_users_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    refused = command("train.py", *SMALL, "hydra.run.dir=mine", cwd=tmp_path)
    assert refused.returncode == 2
    assert f"already holds a run (its {name})" in refused.stderr
    assert (tmp_path / "mine" / name).read_text() == "mine"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [name]


def test_fallback_is_loud_and_in_the_name(tmp_path: Path) -> None:
    small = [override for override in SMALL if not override.startswith("data")]
    run = command("train.py", *small, f"data.root={tmp_path}/typo", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "NO OMNIGLOT" in run.stdout
    (metrics_file,) = tmp_path.glob("outputs/glyphs-5w1s/*/metrics.json")
    assert json.loads(metrics_file.read_text())["dataset"] == "glyphs"


def test_multirun_gives_each_job_a_folder(tmp_path: Path) -> None:
    sweep = command("train.py", "--multirun", "inner.second_order=true,false", *SMALL, cwd=tmp_path)
    assert sweep.returncode == 0, sweep.stderr
    found = list(tmp_path.glob("outputs/sweeps/*/glyphs-5w1s/maml-*/metrics.json"))
    assert {json.loads(p.read_text())["second_order"] for p in found} == {True, False}
    assert len({p.parents[2] for p in found}) == 1, "one sweep, one folder"
    assert {p.name for p in tmp_path.iterdir()} == {"outputs"}


def test_a_sweep_goes_on_in_folders_that_stay(tmp_path: Path) -> None:
    resumed = [*SMALL, "run.seed=0,1", "run.resume=auto"]
    refused = command("train.py", "--multirun", *resumed, cwd=tmp_path)
    assert refused.returncode == 2
    assert "the folders of a sweep are named by the time" in refused.stderr
    named = ["hydra.sweep.dir=mine", "hydra.sweep.subdir=seed${run.seed}"]
    first = command("train.py", "--multirun", *resumed, *named, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "mine" / "seed1" / "metrics.json").unlink()
    again = command("train.py", "--multirun", *resumed, *named, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "This run is finished: " in again.stdout
    assert "Going on from meta-step 4" in again.stdout
    assert {p.parent.name for p in tmp_path.rglob("metrics.json")} == {"seed0", "seed1"}


def test_cfg_job_shows_the_configuration(tmp_path: Path) -> None:
    shown = command("train.py", "--cfg", "job", "inner.lr=0.25", cwd=tmp_path)
    assert shown.returncode == 0
    assert re.search(r"inner:\n  lr: 0\.25\n", shown.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help(script: str, tmp_path: Path) -> None:
    shown = command(script, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert f"usage: python {REPO / 'scripts' / script}" in shown.stdout
    assert "run.device=" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inner.second_ordr=true"], "Did you mean inner.second_order?"),
        (["inner.second_order=maybe"], "inner.second_order=maybe: must be true or false"),
        (["--cfg", "job", "inner.steps=-1"], "inner.steps=-1: must be a whole number, at least 0"),
        (["data.root=/nonexistent", "data.fallback=null"], "data.root=/nonexistent: there is no such folder"),
        (["--multirun", "inner.steps=1,-2"], "inner.steps=-2: must be"),
        (["--multirun", "inner.second_ordr=true,false"], "Did you mean inner.second_order?"),
        (["run.device=cuda:99"], "run.device=cuda:99: PyTorch sees"),
    ],
)
def test_refusals_have_an_exit_code_and_no_stack_trace(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused = command("train.py", *arguments, cwd=tmp_path)
    assert refused.returncode == 2, refused.stdout
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout


def test_evaluate_refuses_a_folder_without_a_run_and_makes_none(tmp_path: Path) -> None:
    refused = command("evaluate.py", f"run.dir={tmp_path}/typo", cwd=tmp_path)
    assert refused.returncode == 2
    assert "not a run's folder" in refused.stderr
    assert not list(tmp_path.iterdir())
