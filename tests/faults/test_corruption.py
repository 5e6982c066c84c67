"""Damaged files of a run (a flipped bit, a cut, code in place of tensors): an older state is loaded, with a warning."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import metalearn
from metalearn.core import serialization as files
from metalearn.core.errors import MetalearnError, RunError
from metalearn.pretrained.model_file import read_model
from metalearn.training.checkpoints import best_path, load_best, load_latest, state_paths
from metalearn.training.tracking.event_files import EVENT_FILES
from tests.faults.cases import cases
from tests.faults.processes import load_state, read_output, start_training, wait_for_exit
from tests.faults.runs import (
    RUN,
    SMALL_RUN,
    STEPS,
    assert_runs_equal,
    assert_steps_increase,
    resume,
    tensors_to_bytes,
    train,
    train_and_kill,
)
from tests.inference.factories import query, support

CPU = torch.device("cpu")


@pytest.fixture
def finished_run(uninterrupted_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(uninterrupted_run, tmp_path / RUN))


@pytest.fixture
def untested_run(finished_run: Path) -> Path:
    """Copy the uninterrupted run as if it had been killed before its test."""
    (finished_run / "metrics.json").unlink()
    return finished_run


FALLS_BACK = "every one detected; falls back to the one before, and says so"


@pytest.mark.fault("one flipped bit in a checkpoint", FALLS_BACK)
@pytest.mark.parametrize("seed", cases(range(300), quick=[0, 10, 11]))
def test_flipped_bit(seed: int, finished_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    # In the newest state, in its digest, or in the best parameters: in turns of ten, one, and four.
    newest, before = state_paths(finished_run)
    path = best_path(finished_run) if seed % 15 > 10 else newest
    named = str(path)
    path = path.with_name(path.name + ".sha256") if seed % 15 == 10 else path
    data = bytearray(path.read_bytes())
    bit = random.Random(seed).randrange(8 * (64 if path.suffix == ".sha256" else len(data)))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    latest = load_latest(finished_run)
    assert latest is not None
    if path == best_path(finished_run):
        expected = latest["state"]
        best = load_best(finished_run, like=expected["params"], device=CPU)
        assert tensors_to_bytes([best.iteration, best.validation_score, best.params]) == tensors_to_bytes(
            expected["best"]
        )
    else:
        assert tensors_to_bytes(latest) == tensors_to_bytes(torch.load(before, weights_only=True))
    assert named in caplog.text


@pytest.mark.fault("one flipped bit in adapted weights, an exported model", "never another answer", cases=400)
@pytest.mark.parametrize("kind", ["adapted weights", "exported model"])
def test_flipped_bit_in_safetensors(kind: str, uninterrupted_run: Path, tmp_path: Path) -> None:
    # Three of four in the header, of which the labels are a third.
    learner = metalearn.load(uninterrupted_run, "cpu")
    images, names = support()
    learner.adapt(images, [f"{name} {'long' * 50}" for name in names])
    path = tmp_path / kind

    def read() -> list[Any]:
        if kind == "exported model":
            params, record = read_model(path)
            return [tensors_to_bytes(params), record]
        learner.restore(path)
        return [learner.classes_, learner.steps_, learner.predict_proba(query()).tolist()]

    whole = (learner.export(path) if kind == "exported model" else learner.save(path)).read_bytes()
    expected, rng = read(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in [*rng.choices(range(header), k=300), *rng.choices(range(header, len(whole)), k=100)]:
        changed = bytearray(whole)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with suppress(MetalearnError):
            assert read() == expected, f"byte {position}"


@pytest.mark.fault("checkpoint cut at 0, 10, 50, 90, 99%", FALLS_BACK)
@pytest.mark.parametrize("percent", cases([0, 10, 50, 90, 99], quick=[2]))
def test_cut_checkpoint(percent: int, untested_run: Path, tmp_path: Path, uninterrupted_run: Path) -> None:
    newest = state_paths(untested_run)[0]
    os.truncate(newest, newest.stat().st_size * percent // 100)
    assert_runs_equal(resume(tmp_path), uninterrupted_run)
    said = " ".join(read_output(tmp_path).split())
    assert "is damaged" in said
    assert f"The one before it is taken: state-{STEPS - 1:08}.pt" in said
    assert f"Resuming from meta-step {STEPS - 1}" in read_output(tmp_path)


class Bomb:
    """Write a file on being unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.mark.fault("malicious pickle as a checkpoint", "refused, no side effect")
@pytest.mark.parametrize("place", cases(["state", "plain pickle", "best parameters"], quick=[0]))
def test_malicious_pickle(
    place: str, untested_run: Path, tmp_path: Path, uninterrupted_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Each with a digest that fits, so that only the restricted loading stands between.
    mark = tmp_path / "it ran"
    newest, _ = state_paths(untested_run)
    path = best_path(untested_run) if place == "best parameters" else newest
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        content = torch.load(path, weights_only=True)
        torch.save({**content, "params": {"head.bias": [Bomb(mark)]}}, path)
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")
    if place == "best parameters":
        load_best(untested_run, like=torch.load(newest, weights_only=True)["state"]["params"], device=CPU)
        assert any("is refused" in line and "could run code" in line for line in caplog.messages)
    assert_runs_equal(resume(tmp_path), uninterrupted_run)
    assert place == "best parameters" or "is refused" in read_output(tmp_path)
    assert not mark.exists()


@pytest.mark.fault("event file cut, then resumed", "monotone steps, none doubled")
@pytest.mark.parametrize("percent", cases([20, 55, 90], quick=[1]))
def test_cut_event_file(percent: int, tmp_path: Path, uninterrupted_run: Path) -> None:
    run_dir = train_and_kill(tmp_path, after=8)
    (events,) = run_dir.glob(EVENT_FILES)
    os.truncate(events, load_state(run_dir)["event_files"][events.name] * percent // 100)
    resume(tmp_path)
    assert_steps_increase(run_dir)
    assert "its curves lack points that were shown before" in " ".join(read_output(tmp_path).split())
    ours, theirs = load_state(run_dir)["state"], load_state(uninterrupted_run)["state"]
    assert ours["iteration"] == theirs["iteration"]


@pytest.mark.fault("metrics.json empty, cut, of zeros, of another content", "one error that names it and what to do")
@pytest.mark.parametrize("text", cases(["", '{"test.ci95', "\0" * 4096, "[1]", "{}", "[" * 100_000], quick=[0]))
def test_damaged_metrics(text: str, finished_run: Path, tmp_path: Path, uninterrupted_run: Path) -> None:
    path = finished_run / "metrics.json"
    path.write_text(text)
    with pytest.raises(RunError, match="does not hold the metrics of a finished run") as error:
        metalearn.load(finished_run, "cpu")
    assert str(path) in str(error.value)
    process = start_training([*SMALL_RUN, "run.resume=true"], tmp_path)
    assert wait_for_exit(process) == 2
    said = " ".join(read_output(tmp_path).split())
    assert "Traceback" not in said
    assert "metrics.json does not hold the metrics of a finished run" in said
    assert "Remove the file" in said
    path.unlink()
    assert_runs_equal(resume(tmp_path), uninterrupted_run)


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same training with another seed, so that every shape is the same."""
    return train(tmp_path_factory.mktemp("other"), "run.seed=1")


@pytest.mark.fault("files of another run in the place of this one's", "refused by the key that differs")
@pytest.mark.parametrize("places", [("newest",), ("newest", "before"), ("best",)], ids="-".join)
def test_files_of_another_run(
    places: tuple[str, ...], untested_run: Path, tmp_path: Path, uninterrupted_run: Path, other_run: Path
) -> None:
    expected = load_best(uninterrupted_run, like=load_state(uninterrupted_run)["state"]["params"], device=CPU)
    for place in places:
        of = {run: [*state_paths(run), best_path(run)] for run in (untested_run, other_run)}
        here, there = (paths[["newest", "before", "best"].index(place)] for paths in of.values())
        for suffix in ("", ".sha256"):
            shutil.copy(f"{there}{suffix}", f"{here}{suffix}")
    best = load_best(untested_run, like=expected.params, device=CPU) if len(places) == 1 else expected
    assert tensors_to_bytes(best) == tensors_to_bytes(expected)
    if places == ("newest", "before"):
        assert wait_for_exit(start_training([*SMALL_RUN, "run.resume=true"], tmp_path)) == 2
        assert "every checkpoint is damaged or another run's" in " ".join(read_output(tmp_path).split())
    else:
        assert_runs_equal(resume(tmp_path), uninterrupted_run)
    if "newest" in places:
        assert "another run wrote it, with another run.seed" in " ".join(read_output(tmp_path).split())


def test_run_may_be_moved_with_what_it_began_with(untested_run: Path, uninterrupted_run: Path) -> None:
    text = (untested_run / "config.yaml").read_text()
    moved = text.replace("init_from: null", "init_from: /moved/run").replace("device: cpu", "device: auto")
    assert moved.count("/moved/run") == moved.count("device: auto") == 1
    (untested_run / "config.yaml").write_text(moved)
    like = load_state(uninterrupted_run)["state"]["params"]
    assert tensors_to_bytes(load_best(untested_run, like=like, device=CPU)) == tensors_to_bytes(
        load_best(uninterrupted_run, like=like, device=CPU)
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": 7}, "its configuration cannot be read"),
        ({"config": "["}, "its configuration cannot be read"),
        ({"config": "of a later release", "format": 2}, "its format is 2.*resume with the version that wrote it"),
    ],
)
def test_state_with_an_odd_configuration(changed: dict[str, Any], message: str, untested_run: Path) -> None:
    for path in state_paths(untested_run):
        files.save_checked({**files.load_checked(path), **changed}, path)
    with pytest.raises(RunError, match=message):
        load_latest(untested_run)


@pytest.mark.fault("a run that an earlier release saved", "resumes to the same bits")
def test_best_parameters_without_configuration(untested_run: Path, tmp_path: Path, uninterrupted_run: Path) -> None:
    content = files.load_checked(best_path(untested_run))
    assert content.pop("config") == (untested_run / "config.yaml").read_text()
    files.save_checked(content, best_path(untested_run))
    assert load_best(untested_run, like=content["params"], device=CPU).iteration == content["iteration"]
    assert_runs_equal(resume(tmp_path), uninterrupted_run)


def test_state_in_the_place_of_best_parameters(finished_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    best, (newest, _) = best_path(finished_run), state_paths(finished_run)
    for suffix in ("", ".sha256"):
        shutil.copy(f"{newest}{suffix}", f"{best}{suffix}")
    load_best(finished_run, like=load_state(finished_run)["state"]["params"], device=CPU)
    assert "it holds no best parameters. The best parameters are taken from the state instead." in caplog.text
