"""``scripts/compare.py`` as a user types it: whole, interrupted, with a variant that fails, and twice at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.commands.test_commands import command, environment_of_its_own
from tests.conftest import REPO

SMALL = [
    "data=glyphs",
    "data.classes=50",
    "model.width=8",
    "task.meta_batch=4",
    "outer.iterations=20",
    "eval.every=10",
    "eval.validation_episodes=4",
    "eval.episodes=8",
    "log.curvature_every=10",
    "compare.seeds=[0]",
    "compare.steps=[1]",
    "compare.repeats=2",
    "compare.jobs=2",
]


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPO / "scripts" / "compare.py"), *arguments],
        cwd=cwd,
        env=environment_of_its_own(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have told the tests to ignore it
    )


def test_comparison_reports_and_goes_on_where_it_was(tmp_path: Path) -> None:
    done = command("compare.py", *SMALL, "hydra.run.dir=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    folder = tmp_path / "mine"
    said = " ".join(done.stdout.split())
    assert "second_order" in said
    assert "percentage points" in said
    written = {path.name for path in folder.iterdir()}
    assert {"report.md", "report.html", "results.json", "cost.json", "plots", "report"} <= written
    content = results(folder)
    assert content["complete"]
    assert [v["name"] for v in content["variants"]] == ["second_order", "first_order"]
    assert {r["engine"] for r in content["cost"]} == {"unroll", "checkpoint", "adjoint"}
    (difference,) = content["differences"]
    metrics = [
        json.loads((folder / f"{v}-seed0" / "metrics.json").read_text()) for v in ("second_order", "first_order")
    ]
    assert difference["accuracy"]["mean"] == pytest.approx(metrics[0]["test.accuracy"] - metrics[1]["test.accuracy"])

    times = {path: path.stat().st_mtime_ns for path in folder.glob("*-seed0/*.json")}
    more = [override for override in SMALL if "seeds" not in override]
    again = command("compare.py", *more, "compare.seeds=[0,1]", "hydra.run.dir=mine", cwd=tmp_path)
    assert again.returncode == 0, again.stderr + again.stdout
    assert "2 of 4 runs are finished already" in again.stdout
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*-seed0/*.json")}
    assert results(folder)["differences"][0]["seeds"] == [0, 1]

    other = command("compare.py", *SMALL, "inner.lr=0.1", "hydra.run.dir=mine", cwd=tmp_path)
    assert other.returncode == 2
    assert "inner.lr: 0.4 in the folder, 0.1 now" in other.stderr
    assert results(folder)["complete"], "a refusal changes nothing"
    few = command("compare.py", *SMALL, "hydra.run.dir=mine", cwd=tmp_path)
    assert "left out of the report: first_order-seed1, second_order-seed1" in " ".join(few.stdout.split())
    onto = command("compare.py", *SMALL, "hydra.run.dir=mine/first_order-seed0", cwd=tmp_path)
    assert onto.returncode == 2
    assert "already holds a run" in onto.stderr


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted_comparison_goes_on(sent: signal.Signals, tmp_path: Path) -> None:
    long = [o for o in SMALL if "iterations" not in o and "jobs" not in o] + ["outer.iterations=40", "compare.jobs=1"]
    process = start(*long, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob("outputs/comparisons/*/*/first_order-seed0/checkpoints/state-*.pt")):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if sent == signal.SIGTERM:
        process.send_signal(sent)  # to the parent alone, which passes it on
    else:
        os.killpg(process.pid, sent)
        kill_children(tmp_path)
    assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    (folder,) = tmp_path.glob("outputs/comparisons/*/*")
    assert not (folder / "results.json").exists()
    finished = (folder / "second_order-seed0" / "metrics.json").stat().st_mtime_ns

    done = command("compare.py", *long, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert list(tmp_path.glob("outputs/comparisons/*/*")) == [folder], "the same folder, found by its configuration"
    assert "1 of 2 runs are finished already" in done.stdout
    assert (folder / "second_order-seed0" / "metrics.json").stat().st_mtime_ns == finished
    log = (folder / "first_order-seed0" / "train.log").read_text()
    assert re.search(r"Going on from meta-step [1-9]", log)
    assert results(folder)["complete"]

    fresh = command("compare.py", *long, "--cfg", "hydra", cwd=tmp_path)
    assert folder.name not in fresh.stdout, "a finished comparison is not gone on with"


def kill_children(folder: Path) -> None:
    """A run that was started by a killed comparison may live on: here the whole machine goes down."""
    subprocess.run(["pkill", "-9", "-f", str(folder)], check=False)


def test_variant_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    variants = "compare.variants=['inner.second_order=true','inner.lr=1e30']"
    done = command("compare.py", *SMALL, variants, "hydra.run.dir=mine", cwd=tmp_path)
    assert done.returncode == 1, done.stderr + done.stdout
    content = results(tmp_path / "mine")
    good, bad = content["variants"]
    assert good["runs"][0]["state"] == "finished"
    assert bad["runs"][0]["state"] == "failed"
    assert "diverged" in bad["runs"][0]["reason"]
    assert "HYDRA" not in bad["runs"][0]["reason"]
    assert not content["complete"]
    said = " ".join(done.stdout.split())
    assert "failed" in said
    assert "diverged" in said
    for report in ("report.md", "report.html"):
        assert "diverged" in (tmp_path / "mine" / report).read_text()

    same_name = "compare.variants=['inner.second_order=true model.pool=max']"
    run = tmp_path / "mine" / "second_order-seed0"
    run.rename(tmp_path / "mine" / "second_order,pool-max-seed0")
    mixed = command("compare.py", *SMALL, same_name, "hydra.run.dir=mine", cwd=tmp_path)
    assert mixed.returncode == 2, mixed.stdout
    assert "model.pool: stride in the folder, max now" in mixed.stderr, "another run's figures are not taken"


def test_two_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    processes = [start(*SMALL, cwd=tmp_path) for _ in range(2)]
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    folders = list(tmp_path.glob("outputs/comparisons/*/*"))
    assert len(folders) == 2
    for folder in folders:
        assert results(folder)["complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare.variants=['inner.second_ordr=true']"], "Did you mean inner.second_order?"),
        (["compare.sedes=[1]"], "Did you mean compare.seeds?"),
        (["data.root=/nonexistent", "data.fallback=null"], "data.root=/nonexistent: there is no such folder"),
    ],
)
def test_refusals_make_no_folder(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused = command("compare.py", *arguments, cwd=tmp_path)
    assert refused.returncode == 2, refused.stdout
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout
    assert not list(tmp_path.iterdir())
