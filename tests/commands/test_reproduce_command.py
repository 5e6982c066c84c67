"""``scripts/reproduce.py`` with real trainings: it stops at the time limit, and the same command resumes."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from metalearn.commands.reproduce import run
from metalearn.commands.reproduce.plan import check_reproduce
from metalearn.commands.reproduce.run import FINISHED, UNFINISHED, TimeLimitReached, run_reproduction
from metalearn.config.commands_schema import ReproduceConfig
from metalearn.config.compose import compose, to_dataclass
from tests.commands.process import words

SMALL = words("""
data=glyphs data.classes=50 model.width=4 task.meta_batch=2 task.queries=1 outer.iterations=60 eval.every=20
eval.validation_episodes=2 eval.episodes=4 log.images=false log.every=100
""")


def test_same_command_resumes_after_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ",".join(f"'{override}'" for override in SMALL)
    overrides = ["experiment_name=omniglot_5way_1shot_cpu", "seeds=[5]", "time_limit_minutes=1", f"overrides=[{small}]"]
    config = to_dataclass(compose("reproduce", overrides), ReproduceConfig)
    check_reproduce(config)
    folder = tmp_path / "omniglot_5way_1shot_cpu" / "second_order-seed5"

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
