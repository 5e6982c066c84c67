"""The figures that a run reports: of which classes they are, and of which parameters."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metalearn import Params
from metalearn.config.run_config import load_run_config
from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.types import Episodes
from metalearn.data.sampler import EpisodeSampler
from metalearn.training import loop
from metalearn.training.checkpoints import best_path, load_latest
from metalearn.training.evaluate_run import evaluate_distributed, evaluate_run
from metalearn.training.evaluation import Evaluation
from metalearn.training.experiment import Experiment, load_data
from metalearn.training.state import TrainState
from metalearn.training.step import apply_meta_update, compute_meta_update
from tests.faults.runs import SMALL, STEPS
from tests.training.run_folders import AT_VALIDATIONS, SINUSOID, run

SPLITS = ("train", "validation", "test")


def test_each_figure_is_of_its_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chance is in it: every image of every task that is drawn is looked for in the data set."""
    drawn: list[Episodes] = []
    numbers: list[tuple[str, int]] = []
    draw = EpisodeSampler.tasks

    def tasks(self: EpisodeSampler, first: int, count: int) -> Episodes:
        drawn.append(draw(self, first, count))
        numbers.append((self.split, first))
        return drawn[-1]

    monkeypatch.setattr(EpisodeSampler, "tasks", tasks)
    run(tmp_path / "run", *AT_VALIDATIONS)
    config = load_run_config(tmp_path / "run" / "config.yaml")
    data = load_data(config)
    owner = {to_bytes(image): split for split in SPLITS for image in getattr(data, split).flatten(0, 1)}
    assert len(owner) == 50 * data.train.shape[1], "no image is in two splits"

    def splits() -> list[str]:
        of_tasks = [
            {owner[to_bytes(image * 255)] for x in (few.support_x, few.query_x) for image in x.flatten(0, 1)}
            for few in drawn
        ]
        assert all(len(of_task) == 1 for of_task in of_tasks)
        return [split for (split,), _ in itertools.groupby(of_tasks)]

    assert splits() == ["train", "validation"] * (STEPS // config.eval.every) + ["test"]
    trained = [first for split, first in dict.fromkeys(numbers) if split == "train"]  # a number of threads may be tried
    assert trained == [step * config.task.meta_batch for step in range(STEPS)], "each task once"
    assert {first for split, first in numbers if split == "test"} == {0, 3}
    drawn.clear()
    evaluate_run(config, tmp_path / "run", tmp_path)
    assert splits() == ["test"]


def to_bytes(image: Tensor) -> bytes:
    return image.round().to(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("scores", "overrides"),
    [
        ([0.2, 0.6, 0.6, 0.4], AT_VALIDATIONS),
        ([0.2, 0.6, math.nan, 0.4], AT_VALIDATIONS),
        ([0.6, 0.2, 0.2, 0.4], [*SINUSOID, "eval.episodes=4"]),
    ],
    ids=["accuracy", "accuracy, one not finite", "error"],
)
def test_the_best_validation_is_kept_and_tested(
    scores: list[float], overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second validation is the best; after fewer inner steps, which do not count, it is the worst."""
    validated: list[Params] = []
    tested: list[Params] = []

    def evaluate(experiment: Experiment, params: Params, *args: Any, test: bool, **more: Any) -> Evaluation:
        (tested if test else validated).append({name: p.clone() for name, p in params.items()})
        found = evaluate_distributed(experiment, params, *args, test=test, **more)
        if test:
            return found
        score = torch.full_like(found.scores, scores[len(validated) - 1])
        score[:-1] = 1 - score[:-1]
        return Evaluation(score, None, experiment.metric)

    monkeypatch.setattr(loop, "evaluate_distributed", evaluate)
    metrics = run(tmp_path / "run", *overrides, "outer.iterations=8", "eval.every=2")
    name = metrics["score"]
    assert metrics["validation.best_iteration"] == 4
    assert metrics[f"validation.best_{name}"] == pytest.approx(scores[1])
    saved = files.load_checked(best_path(tmp_path / "run"))
    assert saved["iteration"] == 4
    for kept in (saved["params"], *tested):
        assert all(torch.equal(kept[key], p) for key, p in validated[1].items())
        assert any(not torch.equal(kept[key], p) for key, p in validated[2].items())
    assert len(tested) == 1
    assert json.loads((tmp_path / "run" / "test_tasks.json").read_text())[name]


@pytest.mark.parametrize("method", ["step", "zero_grad"])
def test_state_within_an_update_is_not_saved(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[Params] = []

    def update(state: TrainState, *args: Any, **more: Any) -> None:
        before.append({name: p.clone() for name, p in state.params.items()})
        if state.iteration == 5:
            whole = getattr(state.optimizer, method)

            def torn() -> None:
                whole()
                raise MemoryError

            monkeypatch.setattr(state.optimizer, method, torn)
        apply_meta_update(state, *args, **more)

    monkeypatch.setattr(loop, "apply_meta_update", update)
    with pytest.raises(RunError, match="checkpoint of meta-step 5 is kept"):
        run(tmp_path / "run", *SMALL)
    state = saved_state(tmp_path / "run")
    assert state["iteration"] == 5
    assert all(torch.equal(state["params"][name], p) for name, p in before[5].items())


@pytest.mark.parametrize("every_s", ["0", "null"])
def test_parameters_that_are_not_finite_are_not_saved(
    every_s: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither between two meta-steps nor when the training ends for another reason."""

    def update(state: TrainState, *args: Any, **more: Any) -> None:
        apply_meta_update(state, *args, **more)
        if state.iteration == 11:
            next(iter(state.params.values())).view(-1)[0] = math.nan

    def memory_runs_out(experiment: Experiment, state: TrainState, *args: Any, **more: Any) -> Any:
        if state.iteration == 11:
            raise MemoryError
        return compute_meta_update(experiment, state, *args, **more)

    monkeypatch.setattr(loop, "apply_meta_update", update)
    monkeypatch.setattr(loop, "compute_meta_update", memory_runs_out)
    with pytest.raises(RunError, match="Out of memory"):
        run(tmp_path / "run", *SMALL, f"run.checkpoint_every_s={every_s}")
    state = saved_state(tmp_path / "run")
    assert state["iteration"] == (10 if every_s == "0" else 8)
    assert all(bool(torch.isfinite(p).all()) for p in state["params"].values())


def saved_state(folder: Path) -> dict[str, Any]:
    content = load_latest(folder)
    assert content is not None
    state: dict[str, Any] = content["state"]
    return state
