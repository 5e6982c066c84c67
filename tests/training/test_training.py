"""Small whole trainings: what they write, that they learn, and that they are reproducible."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metalearn.config.compose import CONF
from metalearn.config.run_config import load_run_config
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.types import Params
from metalearn.metagrad import ENGINES
from metalearn.training import loop, trainer
from metalearn.training.checkpoints import best_path, load_best
from metalearn.training.evaluate_run import evaluate_run
from metalearn.training.experiment import build_experiment
from metalearn.training.state import TrainState
from metalearn.training.step import apply_meta_update
from metalearn.training.tracking import curvature
from tests.training.run_folders import run

SMALL = [
    *("data=glyphs", "data.classes=60", "data.jitter=0.05", "model.width=16", "task.meta_batch=8", "log.every=5"),
    *("outer.iterations=40", "outer.lr=0.005", "eval.every=20", "eval.validation_episodes=20", "eval.episodes=60"),
]
QUICK = [*SMALL, "model.width=8", "task.meta_batch=4", "outer.iterations=4", "eval.every=4", "eval.episodes=8"]
NO_WIDTH = [override for override in QUICK if not override.startswith("model.")]
Finished = tuple[Path, dict[str, Any]]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def curve(folder: Path, tag: str) -> list[float]:
    return [event.value for event in events(folder).Scalars(tag)]


def best_params(folder: Path) -> Params:
    params: Params = files.load_checked(best_path(folder))["params"]
    return params


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run") / "second_order"
    return folder, run(folder, *SMALL)


def test_training_learns(finished: Finished) -> None:
    _, metrics = finished
    assert metrics["test.accuracy"] - metrics["test.ci95"] > 0.5, "chance is 0.2"
    assert metrics["test.accuracy_nontransductive"] > 0.4
    per_step = metrics["test.accuracy_per_step"]
    assert per_step[0] < 0.35, "nothing can be known of the labels before adaptation"
    assert per_step[-1] == metrics["test.accuracy"]


def test_metrics_json_holds_the_documented_keys(finished: Finished) -> None:
    _, metrics = finished
    expected = {"dataset": "glyphs", "algorithm": "maml", "engine": "unroll", "second_order": True, "seed": 0}
    expected |= {"iterations": 40, "test.episodes": 60, "test.inner_steps": 3}
    if not torch.cuda.is_available():
        expected |= {"device": "cpu", "memory.kind": "cpu-tensors"}
    assert expected.items() <= metrics.items()
    seconds = ("time.training_s", "time.logging_s", "time.total_s")
    assert metrics["time.training_s"] + metrics["time.logging_s"] < metrics["time.total_s"]
    for name in ("test.accuracy", "test.ci95", "memory.peak_mib", "time.meta_step_ms", *seconds):
        assert math.isfinite(metrics[name])
        assert metrics[name] > 0, name


def test_event_file_holds_every_tag(finished: Finished) -> None:
    folder, metrics = finished
    shown = events(folder)
    scalars = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    every_5 = ["loss/query", "accuracy/train", "loss/support", "gradients/norm"]
    for tag in (*every_5, "cost/meta_step_ms", "cost/peak_mib", "optimizer/lr"):
        first = [] if tag == "cost/meta_step_ms" and not torch.cuda.is_available() else [1]  # it is not timed
        assert [step for step, _ in scalars[tag]] == [*first, *range(5, 41, 5)], tag
        assert all(math.isfinite(value) for _, value in scalars[tag])
    cosine = [0.005 * (1 + math.cos(math.pi * (step - 1) / 40)) / 2 for step in [1, *range(5, 41, 5)]]
    assert [value for _, value in scalars["optimizer/lr"]] == pytest.approx(cosine, rel=1e-5), "the rate that was used"
    for tag in ("accuracy/validation", "intervals/accuracy/validation_low", "intervals/accuracy/validation_high"):
        assert [step for step, _ in scalars[tag]] == [20, 40]
    low, mean, high = (
        scalars[tag][-1][1]
        for tag in ("intervals/accuracy/validation_low", "accuracy/validation", "intervals/accuracy/validation_high")
    )
    assert low < mean < high
    by_step = [value for _, value in scalars["accuracy/test_by_inner_step"]]
    assert by_step == pytest.approx(metrics["test.accuracy_per_step"])
    assert [image.step for image in shown.Images("tasks/validation")] == [20, 40]
    text = shown.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "second_order: true" in text


@pytest.mark.parametrize("engine", ["checkpoint", "adjoint"])
def test_every_engine_takes_the_same_steps(engine: str, tmp_path: Path) -> None:
    base = [*QUICK, "inner.steps=3", "inner.lr=0.05", "log.every=1"]
    run(tmp_path / "unroll", *base)
    more = [f"inner.engine={engine}", "inner.task_chunk=3", "inner.checkpoint_every=2"]
    assert run(tmp_path / engine, *base, *more)["engine"] == engine
    norms = curve(tmp_path / engine, "gradients/norm")
    # float32, and Adam's first steps are signs
    assert norms == pytest.approx(curve(tmp_path / "unroll", "gradients/norm"), rel=1e-2)


def test_auto_engine_is_resolved_before_the_first_step(tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", *QUICK, "inner.engine=auto", "run.memory_limit_mib=2")
    assert metrics["engine"] in ENGINES
    assert metrics["memory.peak_mib"] <= 2.5  # the optimiser's step is in it as well
    kept = load_run_config(tmp_path / "run" / "config.yaml").inner
    assert (kept.engine, kept.task_chunk) == (metrics["engine"], metrics["task_chunk"])
    with pytest.raises(RunError, match=r"no engine fits into 0\.100 MiB"):
        run(tmp_path / "tight", *QUICK, "inner.engine=auto", "run.memory_limit_mib=0.1")


def test_second_order_metrics_are_logged_when_due(tmp_path: Path) -> None:
    due = ["log.curvature_every=2", "log.eigenvalue_every=2", "log.every=4"]
    run(tmp_path / "run", *QUICK, *due, "inner.steps=2")
    shown = events(tmp_path / "run")
    tags = {tag for tag in shown.Tags()["scalars"] if tag.startswith("gradients/") and tag != "gradients/norm"}
    norms = {f"gradients/adjoint_norm/step_{k}" for k in range(3)}
    assert tags == {"gradients/cosine_first_vs_second", "gradients/support_top_eigenvalue", *norms}
    for tag in tags:
        points = shown.Scalars(tag)
        assert [e.step for e in points] == ([2, 4] if "eigenvalue" in tag else [1, 2, 4]), "the first one as well"
        assert all(math.isfinite(e.value) for e in points)


@pytest.mark.parametrize("order", ["true", "false"])
def test_second_order_metrics_leave_the_training_as_it_is(order: str, tmp_path: Path) -> None:
    # The network draws from torch's and from Python's generator.
    model = ["model=custom", "model.target=tests.training.own_code:Noisy", f"inner.second_order={order}"]
    kept = []
    for every in ("null", "1"):
        more = [f"log.curvature_every={every}", f"log.eigenvalue_every={every}", "run.threads=1"]
        run(tmp_path / every, *NO_WIDTH, *model, *more)
        kept.append(best_params(tmp_path / every))
    assert "gradients/cosine_first_vs_second" in events(tmp_path / "1").Tags()["scalars"]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_second_order_metrics_never_end_a_first_order_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ["model=custom", "model.target=tests.training.own_code:OnceDifferentiable", "inner.second_order=false"]
    curvature._warn_once.cache_clear()
    metrics = run(tmp_path / "run", *NO_WIDTH, *model, "log.curvature_every=1")
    assert metrics["iterations"] == 4
    (warning,) = [record.message for record in caplog.records if "No second-order metrics" in record.message]
    assert "log.curvature_every=null" in warning, "once, not at every meta-step"


def test_mixed_precision_is_verified_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []

    def verify(*args: Any, precision: str, **more: Any) -> str:
        assert not torch.is_autocast_enabled("cpu"), "the reference must be float32"
        verified.append(precision)
        return "fine"

    monkeypatch.setattr(trainer, "check_precision", verify)
    metrics = run(tmp_path / "low", *QUICK, "log.every=1", "run.precision=bfloat16")
    assert verified == ["bfloat16"]
    assert metrics["precision"] == "bfloat16"
    run(tmp_path / "full", *QUICK, "log.every=1")
    low, full = (curve(tmp_path / name, "loss/query") for name in ("low", "full"))
    assert low != full
    assert low == pytest.approx(full, rel=0.1)
    assert verified == ["bfloat16"], "float32 needs no check"


def test_best_checkpoint_is_the_reported_one(finished: Finished) -> None:
    folder, metrics = finished
    assert metrics["validation.best_accuracy"] == pytest.approx(max(curve(folder, "accuracy/validation")))
    experiment = build_experiment(load_run_config(folder / "config.yaml"))
    best = load_best(folder, like=experiment.theta, device=experiment.device)
    assert best.iteration == metrics["validation.best_iteration"]


def test_evaluate_run_repeats_the_test(finished: Finished, tmp_path: Path) -> None:
    folder, metrics = finished
    before = sorted(p.name for p in folder.rglob("*"))
    evaluate_run(load_run_config(folder / "config.yaml"), folder, tmp_path)
    again = json.loads((tmp_path / "metrics.json").read_text())
    for name in (key for key in metrics if key.startswith("test.")):
        assert again[name] == metrics[name], name
    assert sorted(p.name for p in folder.rglob("*")) == before, "the run's own folder is left alone"


def test_same_seed_is_bitwise_reproducible(finished: Finished, tmp_path: Path) -> None:
    folder, metrics = finished
    again = run(tmp_path / "again", *SMALL)
    same = {name: value for name, value in metrics.items() if not name.startswith("time.")}
    assert same == {name: value for name, value in again.items() if not name.startswith("time.")}
    first, second = best_params(folder), best_params(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_order_and_seed_change_the_run(finished: Finished, tmp_path: Path) -> None:
    folder, metrics = finished
    first_order = run(tmp_path / "first", *SMALL, "inner.second_order=false")
    other_seed = run(tmp_path / "seed", *SMALL, "run.seed=1")
    assert first_order["second_order"] is False
    assert first_order["memory.peak_mib"] < metrics["memory.peak_mib"]
    for other in ("first", "seed"):
        assert not torch.equal(best_params(folder)["head.weight"], best_params(tmp_path / other)["head.weight"])
    assert other_seed["test.accuracy"] > 0.4


def test_folder_with_a_run_is_not_overwritten(finished: Finished) -> None:
    folder, _ = finished
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(RunError, match=r"already holds a run.*hydra\.run\.dir"):
        run(folder, *SMALL)
    assert (folder / "metrics.json").read_bytes() == before


def test_divergence_raises_with_remedy_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"diverged at meta-step \d+: .*outer\.clip_norm=10.*meta-step \d+ is kept"):
        run(tmp_path / "run", *SMALL, "outer.lr=1e30", "eval.every=1", "outer.schedule=constant", "log.every=1")
    assert files.load_checked(best_path(tmp_path / "run"))["iteration"] >= 1
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_nonfinite_parameters_are_neither_saved_nor_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last update is what breaks them, so that no loss shows it.
    def break_parameters(state: TrainState, *args: Any, **kwargs: Any) -> None:
        apply_meta_update(state, *args, **kwargs)
        if state.iteration == 20:
            state.params["head.bias"].fill_(math.nan)

    monkeypatch.setattr(loop, "apply_meta_update", break_parameters)
    with pytest.raises(RunError, match=r"at meta-step 20: a parameter is not finite.*meta-step 15 is kept"):
        run(tmp_path / "run", *SMALL, "eval.every=5", "outer.iterations=20")
    assert files.load_checked(best_path(tmp_path / "run"))["iteration"] <= 15


def test_invalid_device_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.device=cuda:99: PyTorch sees \d+ CUDA devices"):
        run(tmp_path / "run", *SMALL, "run.device=cuda:99")
    assert not (tmp_path / "run").exists()


def test_training_of_one_iteration_without_inner_steps(tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", *SMALL, "inner.steps=0", "inner.eval_steps=0", "outer.iterations=1")
    assert len(metrics["test.accuracy_per_step"]) == 1
    assert metrics["time.meta_step_ms"] > 0
    assert "loss/support" not in events(tmp_path / "run").Tags()["scalars"]


def test_clip_norm_bounds_the_update_at_a_constant_rate(tmp_path: Path) -> None:
    constant = ["outer.lr=1e-3", "outer.schedule=constant", "outer.iterations=5"]
    run(tmp_path / "run", *SMALL, *constant, "outer.clip_norm=1e-12")
    assert curve(tmp_path / "run", "optimizer/lr") == [pytest.approx(1e-3)] * 2  # at the first meta-step, and the last
    theta = build_experiment(load_run_config(tmp_path / "run" / "config.yaml")).theta
    params = best_params(tmp_path / "run")
    # Adam divides by the gradient's size plus 1e-8, so that a gradient of 1e-12 moves nothing by more than 1e-4 lr.
    assert all((params[name] - theta[name]).abs().max() < 1e-6 for name in theta)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains(name: str, tmp_path: Path) -> None:
    small = ["task.meta_batch=2", "outer.iterations=2", "eval.validation_episodes=2", "eval.episodes=2", "eval.every=2"]
    small += ["eval.queries=1", "inner.steps=1", "inner.eval_steps=1"]  # of 20 ways the test takes longest
    small += [] if name == "sinusoid" else ["model.width=4"]
    metrics = run(tmp_path / "run", f"experiment={name}", *small)
    assert metrics["iterations"] == 2
    if name == "sinusoid":
        assert metrics["task"] == "10-shot"
        assert metrics["test.mse"] > 0
        return
    assert metrics["task"] in name.replace("way_", "-way ").replace("omniglot_", "").replace("shot", "-shot")


@pytest.mark.gpu
def test_gpu_run_reports_the_allocators_peak(tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", *SMALL, "run.device=cuda")
    assert metrics["memory.kind"] == "cuda"
    assert metrics["device"].startswith("cuda (")
    assert metrics["test.accuracy"] > 0.5
