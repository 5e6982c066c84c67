"""Checkpoints: which are kept, which is loaded, and the state that they restore."""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from metalearn.config.schema import OuterConfig
from metalearn.core import serialization as files
from metalearn.core.errors import RunError, RunExistsError
from metalearn.training import loop
from metalearn.training.checkpoints import (
    best_path,
    load_best,
    load_latest,
    restore_best,
    save_best,
    save_state,
    state_path,
    state_paths,
)
from metalearn.training.evaluate_run import evaluate_distributed
from metalearn.training.evaluation import Evaluation
from metalearn.training.state import BestCheckpoint, TrainState, learning_rate
from metalearn.training.step import MetaUpdate, apply_meta_update
from tests.faults.processes import load_state
from tests.training.run_folders import AT_VALIDATIONS, run

CPU = torch.device("cpu")


def params(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


def save_states(folder: Path, *iterations: int) -> None:
    for iteration in iterations:
        save_state({"n": iteration}, iteration, folder)


def test_last_two_states_are_kept_with_their_digests(tmp_path: Path) -> None:
    save_states(tmp_path, 3, 7, 9)
    assert state_paths(tmp_path) == [state_path(tmp_path, 9), state_path(tmp_path, 7)]
    state_path(tmp_path, 9).unlink()  # its digest goes as well
    save_states(tmp_path, 11)
    assert state_paths(tmp_path) == [state_path(tmp_path, 11), state_path(tmp_path, 7)]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4, "each with its digest, and nothing else"


def test_states_after_the_saved_one_are_removed(tmp_path: Path) -> None:
    save_states(tmp_path, 3, 7)
    state_path(tmp_path, 7).write_bytes(b"damaged")
    save_states(tmp_path, 5)
    assert state_paths(tmp_path) == [state_path(tmp_path, 5), state_path(tmp_path, 3)]


def test_load_latest_raises_for_another_format(tmp_path: Path) -> None:
    files.save_checked({"format": 99, "state": {}, "meter": {}}, state_path(tmp_path, 1))
    with pytest.raises(RunError, match="its format is 99, and this version of metalearn reads 1"):
        load_latest(tmp_path)


def test_load_latest_raises_when_all_states_are_damaged(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    save_states(tmp_path, 1)
    state_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(RunError, match=r"(?s)every checkpoint is damaged.*state-00000001\.pt is damaged"):
        load_latest(tmp_path)


def test_restore_best_follows_the_state(tmp_path: Path) -> None:
    save_best(BestCheckpoint(20, 0.9, params(2.0)), tmp_path, "")  # later than the state
    restore_best(BestCheckpoint(10, 0.8, params(1.0)), tmp_path, "")
    best = load_best(tmp_path, like=params(0.0), device=CPU)
    assert (best.iteration, best.validation_score) == (10, 0.8)
    assert torch.equal(best.params["w"], params(1.0)["w"])
    restore_best(None, tmp_path, "")
    assert not best_path(tmp_path).exists()


def test_load_best_falls_back_to_the_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = BestCheckpoint(10, 0.8, params(1.0))
    save_best(best, tmp_path, "")
    best_path(tmp_path).write_bytes(b"x")
    with pytest.raises(RunError, match=r"best\.pt is damaged"):
        load_best(tmp_path, like=params(0.0), device=CPU)
    save_state({"state": {"best": list(best)}, "meter": {}}, 12, tmp_path)
    for _ in range(2):
        found = load_best(tmp_path, like=params(0.0), device=CPU)
        assert torch.equal(found.params["w"], params(1.0)["w"])
        assert "taken from the state" in caplog.text
        files.remove(best_path(tmp_path))  # the second time it is gone
        caplog.clear()


def test_load_best_raises_for_another_model(tmp_path: Path) -> None:
    save_best(BestCheckpoint(10, 0.8, params(1.0)), tmp_path, "")
    with pytest.raises(RunError, match=r"parameter 'w' is \(2,\) in it and \(3,\)"):
        load_best(tmp_path, like={"w": torch.zeros(3)}, device=CPU)


def outer(**changed: Any) -> OuterConfig:
    return OuterConfig(**{"lr": 0.1, "iterations": 10, "schedule": "cosine", "clip_norm": None, **changed})


def steps(state: TrainState, count: int) -> TrainState:
    for _ in range(count):
        grads = {name: torch.ones_like(p) for name, p in state.params.items()}
        apply_meta_update(
            state, MetaUpdate(grads, {"grad_norm": torch.tensor(1.0)}, stop_requested=False), clip_norm=None
        )
    return state


@pytest.mark.parametrize("iterations", [1, 7, 100])
def test_cosine_schedule_equals_torchs(iterations: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = CosineAnnealingLR(optimizer, iterations)
    for t in range(iterations):
        assert learning_rate(outer(lr=0.3, iterations=iterations), t) == pytest.approx(theirs.get_last_lr()[0])
        assert learning_rate(outer(lr=0.3, iterations=iterations, schedule="constant"), t) == 0.3
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
    assert (state.iteration, state.lr) == (4, learning_rate(outer(**changed), 4))
    assert torch.equal(state.optimizer.state_dict()["state"][0]["exp_avg"], content["optimizer"]["state"][0]["exp_avg"])


def test_state_of_a_gpu_resumes_on_a_cpu_unfused() -> None:
    # A GPU's optimizer is fused, and rounds differently.
    here = steps(TrainState.create(params(1.0), outer()), 4)
    content = copy.deepcopy(here.state_dict())
    (group,) = content["optimizer"]["param_groups"]
    assert group["fused"] is None
    group["fused"] = True
    resumed = TrainState.create(params(0.0), outer())
    resumed.load_state_dict(content)
    assert resumed.optimizer.param_groups[0]["fused"] is None
    assert group["fused"] is True, "the saved content is not changed"
    assert torch.equal(steps(resumed, 3).params["w"], steps(here, 3).params["w"])


def test_folder_without_its_configuration_raises(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "config.yaml").unlink()
    (folder / "metrics.json").unlink()
    with pytest.raises(RunExistsError, match="its checkpoints"):
        run(folder, *AT_VALIDATIONS, "run.resume=auto")
    assert state_paths(folder) == [folder / path.relative_to(finished) for path in state_paths(finished)]


def test_meta_step_time_excludes_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, **more: Any) -> Evaluation:
        time.sleep(0.5)
        return evaluate_distributed(*args, **more)

    monkeypatch.setattr(loop, "evaluate_distributed", slow)
    run(tmp_path / "run", *AT_VALIDATIONS, "outer.iterations=2", "eval.every=2")
    assert load_state(tmp_path / "run")["meter"]["window"]["passed_s"] < 0.25
