"""Signals stop a training at the next meta-step, in validation or in the test; a second signal stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metalearn.core.errors import TerminatedError
from metalearn.training import loop
from metalearn.training.evaluate_run import evaluate_distributed
from metalearn.training.evaluation import Evaluation
from metalearn.training.run_folder import folder_lock
from metalearn.training.runtime.signals import StopRequest, signals_as_exceptions
from tests.faults.processes import load_state, read_output, start_training, wait_for_exit
from tests.faults.runs import RUN, SMALL_RUN, assert_runs_equal, resume

OTHERS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
    """Handle the signals as a shell leaves them; nohup may have told the tests to ignore one."""
    before = [(number, signal.signal(number, signal.SIG_DFL)) for number in OTHERS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, *OTHERS])
def test_first_signal_is_recorded_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        stop.raise_if_requested()
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(TerminatedError, match=f"Stopped by {number.name}") as stopped:
            stop.raise_if_requested()
        assert stopped.value.signal == number
    assert signal.getsignal(number) is before


def test_no_signal_is_handled_outside_the_main_thread() -> None:
    seen: list[bool] = []

    def elsewhere() -> None:
        with StopRequest() as stop, signals_as_exceptions():
            seen.append(stop.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.mark.parametrize("number", OTHERS)
def test_signals_as_exceptions_raises_system_exit(number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as ended, signals_as_exceptions():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", OTHERS)
def test_signal_that_is_ignored_or_used_is_left_alone(number: signal.Signals) -> None:
    received: list[int] = []
    for handler in (signal.SIG_IGN, lambda number, frame: received.append(number)):
        signal.signal(number, handler)
        with signals_as_exceptions(), StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert not stop.requested
    assert received == [number]


def test_only_sigterm_and_sigint_insist() -> None:
    with signals_as_exceptions(), StopRequest() as stop:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGXCPU):  # of a closed terminal, its shell, a limit
            os.kill(os.getpid(), number)
            assert stop.signal == signal.SIGHUP
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM


def test_swallowed_exit_is_obeyed_later() -> None:
    with signals_as_exceptions():
        with contextlib.suppress(SystemExit):  # as some import might
            os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest() as stop:
            assert stop.signal == signal.SIGTERM
    with StopRequest() as stop:
        assert not stop.requested


def signal_itself_in(what: str) -> None:
    """Have this process signal itself in its first validation, or in its test."""

    def signal_and_evaluate(*args: Any, test: bool, **more: Any) -> Evaluation:
        if test is (what == "test"):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_distributed(*args, test=test, **more)

    pytest.MonkeyPatch().setattr(loop, "evaluate_distributed", signal_and_evaluate)


@pytest.mark.parametrize(("what", "iteration"), [("validation", 8), ("test", 24)])
def test_interrupted_validation_and_test_are_repeated(
    what: str, iteration: int, uninterrupted_run: Path, tmp_path: Path
) -> None:
    process = start_training(SMALL_RUN, tmp_path, before=signal_itself_in, args=(what,))
    assert wait_for_exit(process) == 143, read_output(tmp_path)
    state = load_state(tmp_path / RUN)["state"]
    assert (state["iteration"], state["validated"]) == (iteration, 0 if what == "validation" else iteration)
    assert f"checkpoint of meta-step {iteration} is kept" in " ".join(read_output(tmp_path).split())
    assert not (tmp_path / RUN / "metrics.json").exists()
    assert_runs_equal(resume(tmp_path), uninterrupted_run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_waiting_for_the_folder_stops_at_once(number: int, code: int, tmp_path: Path) -> None:
    with folder_lock(tmp_path / RUN, wait=False):
        process = start_training([*SMALL_RUN, "run.resume=auto"], tmp_path)
        while "waiting for it to end" not in " ".join((tmp_path / "output.txt").read_text().split()):
            assert process.exitcode is None
            time.sleep(0.05)
        os.kill(process.pid or 0, number)
        assert wait_for_exit(process, timeout_s=30) == code
    assert not (tmp_path / RUN / "config.yaml").exists()


def signal_itself_twice() -> None:
    """Have this process signal itself twice in the middle of a long meta-step."""

    def slow(*args: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        Path("signalled once").touch()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    pytest.MonkeyPatch().setattr(loop, "compute_meta_update", slow)


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = start_training(SMALL_RUN, tmp_path, before=signal_itself_twice)
    assert wait_for_exit(process, timeout_s=30) == 130
    assert (tmp_path / "signalled once").exists()
    assert not list((tmp_path / RUN / "checkpoints").glob("*")), "nothing was saved"
