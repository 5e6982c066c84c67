"""Checkpoints: which are kept, which is loaded, and the state that they restore."""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from metalearn.config.schema import OuterConfig
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError, RunError, RunExistsError
from metalearn.training import loop
from metalearn.training.checkpoints import (
    best_path,
    load_best,
    load_latest,
    save_best,
    save_state,
    state_path,
    state_paths,
    sync_best,
)
from metalearn.training.evaluate_run import evaluate_distributed
from metalearn.training.evaluation import Evaluation
from metalearn.training.state import BestCheckpoint, TrainState, learning_rate
from metalearn.training.step import MetaUpdate, apply_update
from tests.faults.processes import load_state
from tests.faults.runs import SMALL
from tests.training.run_folders import run

AT_VALIDATIONS = [*SMALL, "run.checkpoint_every_s=null"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder, *AT_VALIDATIONS)
    return folder


def params(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


def test_last_two_states_are_kept(tmp_path: Path) -> None:
    for iteration in (3, 7, 9):
        save_state({"n": iteration}, iteration, tmp_path)
    assert state_paths(tmp_path) == [state_path(tmp_path, 9), state_path(tmp_path, 7)]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4, "each with its digest, and nothing else"


def test_states_after_the_saved_one_are_removed(tmp_path: Path) -> None:
    for iteration in (3, 7):
        save_state({"n": iteration}, iteration, tmp_path)
    state_path(tmp_path, 7).write_bytes(b"damaged")
    save_state({"n": 5}, 5, tmp_path)
    assert [path.name for path in state_paths(tmp_path)] == ["state-00000005.pt", "state-00000003.pt"]


def test_load_latest_raises_for_another_format(tmp_path: Path) -> None:
    save_state({"n": 1}, 1, tmp_path)
    files.save_checked({"format": 99, "state": {}, "meter": {}}, state_path(tmp_path, 1))
    with pytest.raises(RunError, match="its format is 99, and this version of metalearn reads 1"):
        load_latest(tmp_path)


def test_load_latest_raises_when_all_states_are_damaged(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    save_state({"n": 1}, 1, tmp_path)
    state_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(RunError, match=r"(?s)every checkpoint is damaged.*state-00000001\.pt is damaged"):
        load_latest(tmp_path)


def test_sync_best_follows_the_state(tmp_path: Path) -> None:
    save_best(BestCheckpoint(20, 0.9, params(2.0)), tmp_path)  # later than the state
    sync_best(BestCheckpoint(10, 0.8, params(1.0)), tmp_path)
    best = load_best(tmp_path, like=params(0.0), device=torch.device("cpu"))
    assert (best.iteration, best.validation_score) == (10, 0.8)
    assert torch.equal(best.params["w"], params(1.0)["w"])
    sync_best(None, tmp_path)
    assert not best_path(tmp_path).exists()


def test_load_best_falls_back_to_the_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = BestCheckpoint(10, 0.8, params(1.0))
    save_best(best, tmp_path)
    best_path(tmp_path).write_bytes(b"x")
    with pytest.raises(RunError, match=r"best\.pt is damaged"):
        load_best(tmp_path, like=params(0.0), device=torch.device("cpu"))
    save_state({"state": {"best": list(best)}, "meter": {}}, 12, tmp_path)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            found = load_best(tmp_path, like=params(0.0), device=torch.device("cpu"))
        assert torch.equal(found.params["w"], params(1.0)["w"])
        assert "taken from the state" in caplog.text
        files.remove(best_path(tmp_path))  # the second time it is gone
        caplog.clear()


def test_load_best_raises_for_another_model(tmp_path: Path) -> None:
    save_best(BestCheckpoint(10, 0.8, params(1.0)), tmp_path)
    with pytest.raises(RunError, match=r"parameter 'w' is \(2,\) in it and \(3,\)"):
        load_best(tmp_path, like={"w": torch.zeros(3)}, device=torch.device("cpu"))


def outer(**changed: Any) -> OuterConfig:
    return OuterConfig(**{"lr": 0.1, "iterations": 10, "schedule": "cosine", "clip_norm": None, **changed})


def steps(state: TrainState, count: int) -> TrainState:
    for _ in range(count):
        grads = {name: torch.ones_like(p) for name, p in state.params.items()}
        apply_update(state, MetaUpdate(grads, {"grad_norm": torch.tensor(1.0)}, stop_requested=False), clip_norm=None)
    return state


@pytest.mark.parametrize("iterations", [1, 7, 100])
def test_cosine_schedule_equals_torchs(iterations: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = CosineAnnealingLR(optimizer, iterations)
    for t in range(iterations):
        assert learning_rate(outer(lr=0.3, iterations=iterations), t) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_meta_step_moves_by_its_learning_rate() -> None:
    state = TrainState.create(params(1.0), outer())
    for t in range(10):
        before = state.params["w"].clone()
        rate = learning_rate(state.outer, t)
        # Adam divides a gradient that is always 1 by its own root mean square, 1
        assert (before - steps(state, 1).params["w"]).tolist() == pytest.approx([rate, rate], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("changed", [{"lr": 0.3}, {"iterations": 20}, {"schedule": "constant"}])
def test_restored_state_takes_the_learning_rate_of_its_own_settings(changed: dict[str, Any]) -> None:
    content = steps(TrainState.create(params(1.0), outer()), 4).state_dict()
    state = TrainState.create(params(0.0), outer(**changed))
    state.load_state_dict(content)
    new = state.outer
    # the cosine from lr to 0 over the iterations, at meta-step 4
    expected = new.lr if new.schedule == "constant" else new.lr * (1 + math.cos(math.pi * 4 / new.iterations)) / 2
    assert state.lr == pytest.approx(expected)
    assert state.iteration == 4
    assert torch.equal(state.optimizer.state_dict()["state"][0]["exp_avg"], content["optimizer"]["state"][0]["exp_avg"])


def test_state_of_a_gpu_resumes_on_a_cpu_unfused() -> None:
    """A GPU's optimizer is fused; its state must not make one here that is, and that rounds otherwise."""
    here = steps(TrainState.create(params(1.0), outer()), 4)
    content = here.state_dict()
    (group,) = content["optimizer"]["param_groups"]
    assert group["fused"] is None
    assert TrainState.create(params(1.0), outer()).optimizer.defaults["fused"] is None
    content = copy.deepcopy(
        {**content, "optimizer": {**content["optimizer"], "param_groups": [{**group, "fused": True}]}}
    )
    resumed = TrainState.create(params(0.0), outer())
    resumed.load_state_dict(content)
    assert resumed.optimizer.param_groups[0]["fused"] is None
    assert content["optimizer"]["param_groups"][0]["fused"] is True, "the saved content is not changed"
    assert torch.equal(steps(resumed, 3).params["w"], steps(here, 3).params["w"])


def test_folder_without_its_configuration_raises(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "config.yaml").unlink()
    (folder / "metrics.json").unlink()
    with pytest.raises(RunExistsError, match="its checkpoints"):
        run(folder, *AT_VALIDATIONS, "run.resume=auto")
    assert state_paths(folder) == [folder / path.relative_to(finished) for path in state_paths(finished)]


def test_meta_step_time_excludes_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = evaluate_distributed

    def slow(*args: Any, **more: Any) -> Evaluation:
        time.sleep(0.5)
        return evaluate(*args, **more)

    monkeypatch.setattr(loop, "evaluate_distributed", slow)
    run(tmp_path / "run", *AT_VALIDATIONS, "outer.iterations=2", "eval.every=2")
    assert load_state(tmp_path / "run")["meter"]["window"]["passed_s"] < 0.25


def test_digests_without_a_state_are_removed(tmp_path: Path) -> None:
    save_state({"n": 1}, 1, tmp_path)
    state_path(tmp_path, 1).unlink()
    save_state({"n": 2}, 2, tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"state-00000002.pt", "state-00000002.pt.sha256"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.checkpoint_every_s=-1"], r"run\.checkpoint_every_s=-1: must be a number, at least 0 or null"),
        (["run.on_nonfinite=ignore"], r"run\.on_nonfinite=ignore: must be one of stop, skip"),
    ],
)
def test_invalid_settings_raise(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", *AT_VALIDATIONS, *overrides)


def test_keys_that_change_no_result_may_differ_on_resume(finished: Path) -> None:
    run(finished, *AT_VALIDATIONS, "run.resume=true", "run.on_nonfinite=skip", "run.checkpoint_every_s=5")
