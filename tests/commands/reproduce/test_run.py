"""Trainings of a row: stopped at the time limit, resumed, and damaged or other runs in its folder."""

from __future__ import annotations

import functools
import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from metalearn.commands.reproduce import run
from metalearn.commands.reproduce.plan import build_rows
from metalearn.commands.reproduce.run import (
    FAILED,
    FINISHED,
    UNFINISHED,
    TimeLimitReached,
    run_reproduction,
    time_limit,
)
from metalearn.commands.reproduce.table import read_rows
from metalearn.config.options import OmniglotConfig
from metalearn.config.run_config import to_yaml
from metalearn.config.schema import TrainConfig
from metalearn.core.errors import ConfigError, RunError
from tests.commands.process import words
from tests.commands.reproduce.factories import ROW, configuration, finish

SMALL = words("""
data=glyphs data.classes=50 model.width=4 task.meta_batch=2 task.queries=1 outer.iterations=60 eval.every=20
eval.validation_episodes=2 eval.episodes=4 log.images=false log.every=100
""")


def test_only_finished_orders_are_saved_at_time_limit(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(configuration("orders=[first]"), recorded / "rows")
    config = configuration("orders=[second,first]", "time_limit_minutes=7")

    def over(*arguments: Any, **settings: Any) -> None:
        raise TimeLimitReached

    monkeypatch.setattr(run, "launch", over)
    state = recorded / "rows" / ROW / "second_order-seed0" / "checkpoints" / "state-00004321.pt"
    state.parent.mkdir(parents=True)
    state.touch()
    monkeypatch.setattr("sys.argv", ["scripts/reproduce.py", f"experiment_name={ROW}", "time_limit_minutes=7"])
    assert run_reproduction(config, recorded / "rows") == UNFINISHED
    (row,) = read_rows(recorded / "rows" / "omniglot.json")
    assert row["order"] == "first"
    output = capsys.readouterr().out
    assert "The time limit is reached (time_limit_minutes=7)." in output
    assert "second_order-seed0: 4321 of 15000 meta-steps" in output
    assert "3 of 6 runs are finished. The same command resumes here:" in output
    assert f"python scripts/reproduce.py experiment_name={ROW} time_limit_minutes=7" in output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"iterations": 7000}, r"is of another run: its iterations is 7000, but 15000 is requested"),
        ({"dataset": "glyphs"}, r"its dataset is glyphs, but omniglot is requested"),
    ],
)
def test_raises_when_metrics_are_of_another_run(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = configuration()
    finish(config, tmp_path / "rows", **changed)
    with pytest.raises(RunError, match=message):
        run_reproduction(config, tmp_path / "rows")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rows": 3'])
def test_raises_when_a_file_is_damaged(text: str, tmp_path: Path) -> None:
    config = configuration()
    finish(config, tmp_path)
    damaged = tmp_path / ROW / "second_order-seed1" / "metrics.json"
    damaged.write_text(text)
    with pytest.raises(RunError, match=r"seed1/metrics\.json does not hold the metrics of a .* run.*Remove the file"):
        run_reproduction(config, tmp_path)
    (tmp_path / "omniglot.json").write_text(text)
    with pytest.raises(RunError, match=r"omniglot\.json is not a file of rows.*Move it away, or restore it"):
        run_reproduction(config, tmp_path)


def test_raises_when_folder_has_another_config(tmp_path: Path) -> None:
    config = configuration()
    finish(config, tmp_path)
    (job, *_) = build_rows(configuration("overrides=['inner.lr=0.3']"), tmp_path)[0].jobs
    (job.folder / "config.yaml").write_text(to_yaml(job.config))
    with pytest.raises(
        RunError, match=r"inner\.lr: 0\.3 in the folder, 0\.4 now\nUse the same values, .*hydra\.run\.dir=PATH\.$"
    ):
        run_reproduction(config, tmp_path)


def test_time_limit_interrupts_only_its_block() -> None:
    with time_limit(None):
        pass
    with pytest.raises(TimeLimitReached), time_limit(0.05 / 60):
        time.sleep(10)
    with time_limit(0.05 / 60):
        pass
    time.sleep(0.1)


def test_same_command_resumes_after_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ",".join(f"'{override}'" for override in SMALL)
    config = configuration("seeds=[5]", "time_limit_minutes=1", f"overrides=[{small}]")
    folder = tmp_path / ROW / "second_order-seed5"

    @contextmanager
    def until_first_state(minutes: float | None) -> Iterator[None]:
        """Reach the time limit when there is a state to resume from, however busy the machine is."""

        def look(number: int, frame: FrameType | None) -> None:
            if any(folder.glob("checkpoints/state-*.pt")):
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise TimeLimitReached

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    with monkeypatch.context() as patch:
        patch.setattr(run, "time_limit", until_first_state)
        assert run_reproduction(config, tmp_path) == UNFINISHED
    assert not (folder / "metrics.json").exists()
    assert not (tmp_path / "omniglot.json").exists()

    assert run_reproduction(config, tmp_path) == FINISHED
    assert re.search(r"from meta-step [1-9]", (folder / "train.log").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    (row,) = json.loads((tmp_path / "omniglot.json").read_text())["rows"]
    assert row["accuracy"] == {"mean": metrics["test.accuracy"], "ci95": metrics["test.ci95"], "over": "tasks"}
    assert (row["dataset"], row["published"], row["seeds"]) == ("glyphs", None, [5])

    with monkeypatch.context() as patch:
        patch.setattr(run, "launch", None)
        assert run_reproduction(config, tmp_path) == FINISHED, "nothing is trained again"


def test_code_that_is_not_there_is_named_before_a_run_is_started(tmp_path: Path) -> None:
    own = "overrides=['model=custom','model.target=metalearn.models:Conv5','data=glyphs']"
    with pytest.raises(ConfigError, match=r"model\.target=metalearn\.models:Conv5: metalearn\.models has no Conv5"):
        run_reproduction(configuration("seeds=[0]", own), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rotated(run_dir: Path, output_dir: Path) -> None:
    output_dir.mkdir()
    metrics = json.loads((run_dir / "metrics.json").read_text()) | {"test.accuracy": 0.5, "rotate_test": True}
    (output_dir / "metrics.json").write_text(json.dumps(metrics))


def test_finished_runs_are_tested_with_rotated_classes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration("seeds=[0,1]")
    finish(config, tmp_path, rotated=False)
    tested = []

    def evaluate(trained: TrainConfig, run_dir: Path, output_dir: Path) -> None:
        assert isinstance(trained.data, OmniglotConfig)
        assert trained.data.rotate_test
        tested.append(run_dir.name)
        rotated(run_dir, output_dir)

    monkeypatch.setattr(run, "evaluate_run", evaluate)
    for _ in range(2):
        assert run_reproduction(config, tmp_path) == FINISHED
    assert tested == ["second_order-seed0", "second_order-seed1"]
    (row,) = read_rows(tmp_path / "omniglot.json")
    assert row["rotated"]["mean"] == 0.5


def test_test_with_rotated_classes_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration("seeds=[0,1]", "time_limit_minutes=5")
    finish(config, tmp_path, rotated=False)

    def evaluate(error: BaseException, trained: TrainConfig, run_dir: Path, output_dir: Path) -> None:
        if run_dir.name == "second_order-seed1":
            raise error
        rotated(run_dir, output_dir)

    errors: list[tuple[BaseException, int, str]] = [
        (TimeLimitReached(), UNFINISHED, "1 of 2 runs are finished. The same command resumes here:"),
        (RunError("best.pt is gone."), FAILED, "no test with rotated test classes: best.pt is gone."),
    ]
    for error, status, text in errors:
        monkeypatch.setattr(run, "evaluate_run", functools.partial(evaluate, error))
        assert run_reproduction(config, tmp_path) == status
        assert text in capsys.readouterr().out
        (row,) = read_rows(tmp_path / "omniglot.json")
        assert (row["accuracy"]["mean"], row["rotated"]) == (pytest.approx(0.981), None), "it is kept at least"


def test_failures_are_named_when_the_time_limit_is_reached_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration("seeds=[0,1]", "time_limit_minutes=5")
    finish(configuration("seeds=[0]"), tmp_path, rotated=False)
    failed = tmp_path / ROW / "second_order-seed1"

    def over(*arguments: Any) -> None:
        raise TimeLimitReached

    monkeypatch.setattr(run, "launch", lambda *arguments, **settings: {failed: "it fell"})
    monkeypatch.setattr(run, "evaluate_run", over)
    assert run_reproduction(config, tmp_path) == FAILED
    assert "second_order-seed1 failed: it fell" in capsys.readouterr().out
