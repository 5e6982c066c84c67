"""What is kept of a run, which of it is taken, and what may change when it goes on."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import load_run_config, resolve_resume
from metalearn.config.schema import OuterConfig, TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError, RunError, RunExistsError
from metalearn.training import session
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
from metalearn.training.tracking.event_files import read_scalars
from metalearn.training.trainer import train
from tests.faults.processes import state_of
from tests.faults.runs import SMALL, assert_curves, timeless


def run(folder: Path, *more: str) -> None:
    config = to_dataclass(compose("train", [*SMALL, "run.checkpoint_every_s=null", *more]), TrainConfig)
    validate_train_config(config)
    train(resolve_resume(config, folder), folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


def params(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), value)}


def test_the_last_two_states_are_kept(tmp_path: Path) -> None:
    for iteration in (3, 7, 9):
        save_state({"n": iteration}, iteration, tmp_path)
    assert state_paths(tmp_path) == [state_path(tmp_path, 9), state_path(tmp_path, 7)]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4, "each with its digest, and nothing else"


def test_a_state_of_a_branch_that_was_left_goes(tmp_path: Path) -> None:
    for iteration in (3, 7):
        save_state({"n": iteration}, iteration, tmp_path)
    state_path(tmp_path, 7).write_bytes(b"damaged")
    save_state({"n": 5}, 5, tmp_path)
    assert [path.name for path in state_paths(tmp_path)] == ["state-00000005.pt", "state-00000003.pt"]


def test_another_format_is_refused(tmp_path: Path) -> None:
    save_state({"n": 1}, 1, tmp_path)
    files.save_checked({"format": 99, "state": {}, "meter": {}}, state_path(tmp_path, 1))
    with pytest.raises(RunError, match="its format is 99, and this version of metalearn reads 1"):
        load_latest(tmp_path)


def test_all_damaged_is_no_new_beginning(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    save_state({"n": 1}, 1, tmp_path)
    state_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(RunError, match=r"(?s)every checkpoint is damaged.*state-00000001\.pt is damaged"):
        load_latest(tmp_path)


def test_best_parameters_follow_the_state(tmp_path: Path) -> None:
    save_best(BestCheckpoint(20, 0.9, params(2.0)), tmp_path)  # of a branch that was left
    sync_best(BestCheckpoint(10, 0.8, params(1.0)), tmp_path)
    best = load_best(tmp_path, like=params(0.0), device=torch.device("cpu"))
    assert (best.iteration, best.validation_score) == (10, 0.8)
    assert torch.equal(best.params["w"], params(1.0)["w"])
    sync_best(None, tmp_path)
    assert not best_path(tmp_path).exists()


def test_damaged_best_parameters_are_in_the_state_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_another_models_parameters_are_refused(tmp_path: Path) -> None:
    save_best(BestCheckpoint(10, 0.8, params(1.0)), tmp_path)
    with pytest.raises(RunError, match=r"parameter 'w' is \(2,\) in it and \(3,\)"):
        load_best(tmp_path, like={"w": torch.zeros(3)}, device=torch.device("cpu"))


def outer(**changed: Any) -> OuterConfig:
    return OuterConfig(**{"lr": 0.1, "iterations": 10, "schedule": "cosine", "clip_norm": None, **changed})


def steps(state: TrainState, count: int) -> TrainState:
    for _ in range(count):
        grads = {name: torch.ones_like(p) for name, p in state.params.items()}
        apply_update(state, MetaUpdate(grads, {"grad_norm": torch.tensor(1.0)}, stop=False), clip_norm=None)
    return state


@pytest.mark.parametrize("iterations", [1, 7, 100])
def test_the_schedule_is_torchs(iterations: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = CosineAnnealingLR(optimizer, iterations)
    for t in range(iterations):
        assert learning_rate(outer(lr=0.3, iterations=iterations), t) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_meta_step_moves_by_its_learning_rate() -> None:
    state = TrainState.start(params(1.0), outer())
    for t in range(10):
        before = state.params["w"].clone()
        rate = learning_rate(state.outer, t)
        # Adam divides a gradient that is always 1 by its own root mean square, 1
        assert (before - steps(state, 1).params["w"]).tolist() == pytest.approx([rate, rate], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("changed", [{"lr": 0.3}, {"iterations": 20}, {"schedule": "constant"}])
def test_an_accepted_schedule_is_as_if_it_had_always_been(changed: dict[str, Any]) -> None:
    content = steps(TrainState.start(params(1.0), outer()), 4).content()
    state = TrainState.start(params(0.0), outer(**changed))
    state.restore(content)
    new = outer(**changed)
    # the cosine from lr to 0 over the iterations, at meta-step 4
    expected = new.lr if new.schedule == "constant" else new.lr * (1 + math.cos(math.pi * 4 / new.iterations)) / 2
    assert state.lr == pytest.approx(expected)
    assert state.iteration == 4
    assert torch.equal(state.optimizer.state_dict()["state"][0]["exp_avg"], content["optimizer"]["state"][0]["exp_avg"])


def test_a_gpus_state_goes_on_here_with_the_bits_of_a_cpu() -> None:
    """A GPU's optimiser is fused; what it has saved must not make one here that is, and rounds otherwise."""
    here = steps(TrainState.start(params(1.0), outer()), 4)
    content = here.content()
    (group,) = content["optimizer"]["param_groups"]
    assert group["fused"] is None
    assert TrainState.start(params(1.0), outer()).optimizer.defaults["fused"] is None
    content = copy.deepcopy(
        {**content, "optimizer": {**content["optimizer"], "param_groups": [{**group, "fused": True}]}}
    )
    resumed = TrainState.start(params(0.0), outer())
    resumed.restore(content)
    assert resumed.optimizer.param_groups[0]["fused"] is None
    assert content["optimizer"]["param_groups"][0]["fused"] is True, "what was saved is left as it is"
    assert torch.equal(steps(resumed, 3).params["w"], steps(here, 3).params["w"])


def test_more_meta_steps_for_a_finished_run(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    run(folder, "outer.iterations=32", "run.resume=true", "run.accept=[outer.iterations]")
    assert timeless(folder)["iterations"] == 32
    earlier = folder / "until-24"
    assert timeless(earlier) == timeless(finished)
    assert load_run_config(earlier / "config.yaml").outer.iterations == 24
    assert load_run_config(folder / "config.yaml").outer.iterations == 32
    assert read_scalars(earlier) == read_scalars(finished)
    assert_curves(folder)
    curves, metrics = read_scalars(folder), json.loads((folder / "metrics.json").read_text())
    assert [p.value for p in curves["test/accuracy"]] == [pytest.approx(metrics["test.accuracy"])]
    shown = [p.value for p in curves["time/median_meta_step_ms"]]
    assert shown == [pytest.approx(metrics["time.meta_step_ms"])]
    assert [p.wall_time for p in curves["outer/lr"]][:10] == [p.wall_time for p in read_scalars(finished)["outer/lr"]]
    run(folder, "outer.iterations=32", "run.resume=true")  # what was accepted is the run's own now
    steps_shown = [p.step for p in read_scalars(folder)["train/query_loss"]]
    assert steps_shown == sorted(set(steps_shown))
    assert steps_shown[-1] == 32


def test_a_change_that_validation_depends_on_lets_no_earlier_accuracy_win(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    run(folder, "eval.queries=2", "run.resume=true", "run.accept=[eval.queries]")
    content = state_of(folder)
    assert content["state"]["best"][0] == 24, "the only validation with two queries"
    kept = load_best(folder / "until-24", like=content["state"]["params"], device=torch.device("cpu"))
    assert kept.iteration == timeless(finished)["validation.best_iteration"]


def test_a_folder_that_has_lost_its_configuration_is_not_begun_anew(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "config.yaml").unlink()
    (folder / "metrics.json").unlink()
    with pytest.raises(RunExistsError, match="its checkpoints"):
        run(folder, "run.resume=auto")
    assert state_paths(folder) == [folder / path.relative_to(finished) for path in state_paths(finished)]


def test_validation_is_no_meta_steps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = evaluate_distributed

    def slow(*args: Any, **more: Any) -> Evaluation:
        time.sleep(0.5)
        return evaluate(*args, **more)

    monkeypatch.setattr(session, "evaluate_distributed", slow)
    run(tmp_path / "run", "outer.iterations=2", "eval.every=2")
    assert state_of(tmp_path / "run")["meter"]["window"]["passed_s"] < 0.25


def test_orphans_of_a_kill_are_removed(tmp_path: Path) -> None:
    save_state({"n": 1}, 1, tmp_path)
    state_path(tmp_path, 1).unlink()
    save_state({"n": 2}, 2, tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"state-00000002.pt", "state-00000002.pt.sha256"}


def test_fewer_meta_steps_than_were_taken_are_refused(finished: Path) -> None:
    before = sorted(p.name for p in finished.iterdir())
    with pytest.raises(RunError, match=r"outer\.iterations=5: the run has taken 24 meta-steps already"):
        run(finished, "outer.iterations=5", "run.resume=true", "run.accept=[outer.iterations]")
    assert sorted(p.name for p in finished.iterdir()) == before


def test_another_model_cannot_be_accepted(finished: Path) -> None:
    with pytest.raises(RunError, match=r"the checkpoint does not fit the model: parameter '.*' is \(8"):
        run(finished, "model.hidden=[9]", "run.resume=true", "run.accept=[model.hidden]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.accept=[inner.lr]"], r"run\.accept=\['inner\.lr'\]: only a run that is resumed"),
        (["run.resume=true", "run.accept=[inner.lrr]"], r"run\.accept=inner\.lrr: .*did you mean inner\.lr\?"),
        (["run.checkpoint_every_s=-1"], r"run\.checkpoint_every_s=-1: must be a number, at least 0 or null"),
        (["run.on_nonfinite=ignore"], r"run\.on_nonfinite=ignore: must be one of stop, skip"),
    ],
)
def test_refused_settings(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", *overrides)


def test_settings_that_change_no_figure_may_differ(finished: Path) -> None:
    run(finished, "run.resume=true", "run.on_nonfinite=skip", "run.checkpoint_every_s=5")
