"""``scripts/compare.py`` as a user types it: complete, interrupted, with a failing variant, and twice at once."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from metalearn.training.run_folder import COMPARISON_FILE
from tests.commands.process import SMALL, command, environment, words
from tests.paths import REPO

SMALL = SMALL + words("""
outer.iterations=20 eval.every=10 log.curvature_every=10 compare.seeds=[0] compare.steps=[1] compare.repeats=2
compare.jobs=2
""")


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPO / "scripts" / "compare.py"), *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have told the tests to ignore it
    )


LONG = [o for o in SMALL if "iterations" not in o and "jobs" not in o] + ["outer.iterations=40", "compare.jobs=1"]


def wait_for_state(run: str, process: subprocess.Popen[str], cwd: Path) -> Path:
    """Wait until a run has saved a state; return the comparison's folder."""
    deadline = time.monotonic() + 120
    while not (found := list(cwd.glob(f"outputs/comparisons/*/*/{run}/checkpoints/state-*.pt"))):
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0].parents[2]


def test_killed_comparison_resumes_and_reports(tmp_path: Path) -> None:
    process = start(*LONG, cwd=tmp_path)
    folder = wait_for_state("first_order-seed0", process, tmp_path)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:  # its runs end too, as if the machine went down
        with suppress(psutil.NoSuchProcess):
            child.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    finished = (folder / "second_order-seed0" / "metrics.json").stat().st_mtime_ns

    done = command("compare.py", *LONG, cwd=tmp_path)
    assert list(tmp_path.glob("outputs/comparisons/*/*")) == [folder], "the same folder, found by its configuration"
    assert "1 of 2 runs are finished already" in done.stdout
    assert (folder / "second_order-seed0" / "metrics.json").stat().st_mtime_ns == finished
    log = (folder / "first_order-seed0" / "train.log").read_text()
    assert re.search(r"from meta-step [1-9]", log)
    output = " ".join(done.stdout.split())
    assert "second_order" in output
    assert "percentage points" in output
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
    assert difference["accuracy"]["mean"] == pytest.approx(
        metrics[0]["test.accuracy"] - metrics[1]["test.accuracy"], abs=1e-6
    )

    fresh = command("compare.py", *LONG, "--cfg", "hydra", cwd=tmp_path)
    assert folder.name not in fresh.stdout, "a finished comparison is not resumed"
    here = f"hydra.run.dir={folder}"
    other = command("compare.py", *LONG, "inner.lr=0.1", here, cwd=tmp_path, code=2)
    assert "inner.lr: 0.4 in the folder, 0.1 now" in other.stderr
    assert results(folder)["complete"], "an error changes nothing"
    onto = command("compare.py", *LONG, f"{here}/first_order-seed0", cwd=tmp_path, code=2)
    assert "already holds a run" in onto.stderr
    copy = shutil.copytree(folder / "second_order-seed0", folder / "second_order-seed1")  # as if it had been trained
    config = re.sub(r"(run:\n(?:  .*\n)*?  seed:) 0", r"\1 1", (copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(config)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*-seed*/*.json")}
    more = command("compare.py", *LONG, "compare.seeds=[0,1]", here, cwd=tmp_path)
    assert "3 of 4 runs are finished already" in more.stdout
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert results(folder)["differences"][0]["seeds"] == [0, 1]
    few = command("compare.py", *LONG, here, cwd=tmp_path)
    assert "left out of the report: first_order-seed1, second_order-seed1" in " ".join(few.stdout.split())


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_comparison_stops_with_its_runs(sent: signal.Signals, tmp_path: Path) -> None:
    process = start(*LONG, "outer.iterations=100000", cwd=tmp_path)
    folder = wait_for_state("second_order-seed0", process, tmp_path)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(sent)
    assert process.wait(60) == 128 + sent
    assert not any(child.is_running() for child in children), "it has waited for them"
    assert process.stdout is not None
    assert "0 of 2 runs are finished. The same command resumes here." in " ".join(process.stdout.read().split())
    assert not (folder / "results.json").exists()


def test_other_variants_finish_when_one_fails(tmp_path: Path) -> None:
    variants = "compare.variants=['inner.second_order=true','inner.lr=1e30']"
    done = command("compare.py", *SMALL, variants, "hydra.run.dir=mine", cwd=tmp_path, code=1)
    content = results(tmp_path / "mine")
    good, bad = content["variants"]
    assert good["runs"][0]["state"] == "finished"
    assert bad["runs"][0]["state"] == "failed"
    assert "diverged" in bad["runs"][0]["reason"]
    assert "HYDRA" not in bad["runs"][0]["reason"]
    assert not content["complete"]
    output = " ".join(done.stdout.split())
    assert "failed" in output
    assert "diverged" in output
    for report in ("report.md", "report.html"):
        assert "diverged" in (tmp_path / "mine" / report).read_text()

    same_name = "compare.variants=['inner.second_order=true model.pool=max']"
    run = tmp_path / "mine" / "second_order-seed0"
    run.rename(tmp_path / "mine" / "second_order,pool-max-seed0")
    mixed = command("compare.py", *SMALL, same_name, "hydra.run.dir=mine", cwd=tmp_path, code=2)
    assert "model.pool: stride in the folder, max now" in mixed.stderr, "another run's metrics are not used"


def test_concurrent_comparisons_use_different_folders(tmp_path: Path) -> None:
    processes = [start(*LONG, "outer.iterations=100000", cwd=tmp_path) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob(f"outputs/comparisons/*/*/{COMPARISON_FILE}"))) < 2:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for process in processes:
            process.terminate()
            process.communicate(timeout=60)
