"""The number of CPU threads is the one at which a meta-step is fastest now, or the user's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn.core.profiling import hardware
from metalearn.training.runtime import threads as threads_module
from metalearn.training.runtime.threads import ThreadTuner
from tests.faults.runs import metrics_without_times
from tests.training.run_folders import AT_VALIDATIONS, run, run_interrupted

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def taking(seconds: dict[int, float], measured: list[int] | None = None) -> Callable[[], float]:
    """Return a step that takes these seconds, by the number of threads."""

    def step() -> float:
        if measured is not None:
            measured.append(torch.get_num_threads())
        return seconds[torch.get_num_threads()]

    return step


@pytest.mark.parametrize(
    ("present", "seconds", "chosen"),
    [
        (2, {1: 1.0, 2: 0.6}, 2),
        (2, {1: 1.0, 2: 1.5}, 1),
        (2, {1: 1.0, 2: 1.1}, 2),
        (1, {1: 1.0, 2: 0.6}, 2),
        (1, {1: 1.0, 2: 0.9}, 1),
    ],
    ids=["quiet", "busy", "noise", "quiet again", "noise again"],
)
def test_fastest_number_is_chosen_if_it_is_clearly_faster(
    present: int, seconds: dict[int, float], chosen: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.set_num_threads(2)
    tuner = ThreadTuner.create("auto", CPU, deterministic=False)
    torch.set_num_threads(present)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            tuner.tune(taking(seconds))
    assert torch.get_num_threads() == chosen
    announced, message = caplog.messages
    assert announced.startswith("run.threads=auto measures meta-steps; ")
    assert message.startswith(f"run.threads=auto: {chosen} (a meta-step takes 1000 ms with 1, ")


def test_slow_number_is_measured_once_on_a_busy_machine() -> None:
    torch.set_num_threads(2)
    measured: list[int] = []
    ThreadTuner.create("auto", CPU, deterministic=False).tune(taking({1: 0.05, 2: 6.0}, measured))
    assert measured == [1, 1, 1, 2]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("resumed", "choices"), [(8, [1, 8]), (4, None), (2, [1, 4]), (1, [1, 2])])
def test_number_that_is_no_choice_is_measured_too(
    resumed: int, choices: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads_module, "num_cores", lambda: 3)
    torch.set_num_threads(2)
    tuner = ThreadTuner.create("auto", CPU, deterministic=False, resumed=resumed, resumed_choices=choices)
    tuner.tune(taking({1: 0.3, 2: 1.0, 3: 1.0, 4: 1.0, 8: 1.0}))
    assert torch.get_num_threads() == 1


def test_number_is_that_of_before_after_an_error() -> None:
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        ThreadTuner.create("auto", CPU, deterministic=False).tune(lambda: 1 / 0)
    assert torch.get_num_threads() == 2


def test_number_is_left_alone_where_it_must_not_change() -> None:
    torch.set_num_threads(2)
    assert ThreadTuner.create("auto", torch.device("cuda"), deterministic=False).choices == ()
    assert ThreadTuner.create("auto", CPU, deterministic=True).choices == ()
    assert ThreadTuner.create(1, CPU, deterministic=False).choices == ()
    assert torch.get_num_threads() == 1, "the user's own number"
    assert ThreadTuner.create("auto", CPU, deterministic=False).choices == ()


def test_measuring_changes_nothing_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "alone", *AT_VALIDATIONS, "run.threads=1")
    measured: list[float] = []

    def tune(tuner: ThreadTuner, seconds_of_step: Callable[[], float]) -> None:
        measured.append(seconds_of_step())

    monkeypatch.setattr(ThreadTuner, "tune", tune)
    monkeypatch.setattr(ThreadTuner, "create", lambda *_, **__: ThreadTuner((1, 2)))
    run(tmp_path / "measured", *AT_VALIDATIONS)
    assert len(measured) == 3, "at the start, and at each validation but the last"
    assert all(seconds > 0 for seconds in measured)
    assert metrics_without_times(tmp_path / "alone") == metrics_without_times(tmp_path / "measured")


def test_resumed_run_begins_with_the_number_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    def tune(tuner: ThreadTuner, seconds_of_step: Callable[[], float]) -> None:
        numbers.append(torch.get_num_threads())
        torch.set_num_threads(1)

    monkeypatch.setattr(ThreadTuner, "tune", tune)
    torch.set_num_threads(2)
    run_interrupted(tmp_path, 10, *AT_VALIDATIONS)
    assert numbers == [2, 1], "at the start, and at the validation after meta-step 8"
    torch.set_num_threads(2)
    run(tmp_path, *AT_VALIDATIONS, "run.resume=true")
    assert numbers == [2, 1, 1], "not measured where it resumes, but at the next validation"


def test_another_number_than_the_checkpoints_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads_module, "num_cores", lambda: 4)
    for setting, deterministic, resumed, threads in (
        *(("auto", False, 1, 1), ("auto", True, 2, 2), (1, False, 1, 1)),
        *(("auto", False, 3, 3), ("auto", True, 1, 1)),  # no choice of this process
    ):
        torch.set_num_threads(2)
        ThreadTuner.create(setting, CPU, deterministic=deterministic, resumed=resumed)  # type: ignore[arg-type]
        assert torch.get_num_threads() == threads
    assert not caplog.messages
    torch.set_num_threads(2)
    for resumed, processes in ((8, 1), (4, 2)):
        ThreadTuner.create("auto", CPU, deterministic=False, resumed=resumed, processes=processes)
        told = f"The checkpoint was written with {resumed} CPU threads, and now it is 2 threads"
        assert caplog.messages.pop().startswith(told)
        caplog.clear()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resumed_run_has_the_choices_that_it_had(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A process of one thread measures nothing; resumed on two, it would choose the faster at the next validation.
    seen: list[tuple[int, tuple[int, ...]]] = []

    def tune(tuner: ThreadTuner, seconds_of_step: Callable[[], float]) -> None:
        seen.append((torch.get_num_threads(), tuner.choices))

    def create(*args: Any, **more: Any) -> ThreadTuner:
        tuner = make(*args, **more)
        seen.append((torch.get_num_threads(), tuner.choices))
        return tuner

    make = ThreadTuner.create
    monkeypatch.setattr(threads_module, "num_cores", lambda: 2)
    monkeypatch.setattr(ThreadTuner, "tune", tune)
    monkeypatch.setattr(ThreadTuner, "create", create)
    torch.set_num_threads(before)
    run_interrupted(tmp_path, 10, *AT_VALIDATIONS)
    torch.set_num_threads(after)
    run(tmp_path, *AT_VALIDATIONS, "run.resume=true")
    assert set(seen) == {(before, (1, 2) if before == 2 else ())}
    assert "sums are rounded differently" not in caplog.text


def test_more_threads_than_cores_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "num_cores", lambda: 2)
    ThreadTuner.create(2, CPU, deterministic=False)
    assert not caplog.messages
    ThreadTuner.create(3, CPU, deterministic=False)
    assert caplog.messages == [
        "run.threads=3: this process may use 2 cores, and more threads wait for each other; take 2 or auto."
    ]
