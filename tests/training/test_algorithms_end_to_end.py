"""Every algorithm, update rule and backend in whole trainings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metalearn.algorithms import ALGORITHMS
from metalearn.commands.compare.variants import check_compare
from metalearn.commands.output_folders import split
from metalearn.commands.reproduce.plan import build_rows, published
from metalearn.config.commands_schema import CompareConfig, ReproduceConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.core.errors import ConfigError, NonFiniteLossError
from metalearn.core.params import relative_error
from metalearn.metagrad import meta_gradient
from metalearn.metagrad.baselines.common import installed_peers
from metalearn.training import step
from metalearn.training.checkpoints import load_best
from metalearn.training.evaluation import ACCURACY, MSE
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.tracking.event_files import read_scalars
from tests.config.factories import train_config
from tests.faults.runs import assert_runs_equal
from tests.training.run_folders import run, run_interrupted

TINY = [
    *("data=glyphs", "data.classes=60", "model=mlp", "model.hidden=[8]", "task.meta_batch=2", "log.images=false"),
    *("outer.iterations=4", "eval.every=2", "eval.validation_episodes=2", "eval.episodes=4", "log.every=1"),
]


def tiny(name: str) -> list[str]:
    steps = [] if name == "protonet" else ["inner.steps=2", "inner.eval_steps=2"]
    return [*TINY, f"algorithm={name}", *steps]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains(name: str, tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", *tiny(name))  # of fewer meta-steps than log.curvature_every
    assert metrics["algorithm"] == name
    assert 0 <= metrics["test.accuracy"] <= 1
    assert 0 <= metrics["test.accuracy_nontransductive"] <= 1
    curves = read_scalars(tmp_path / "run")
    assert all(math.isfinite(p.value) for p in curves["loss/query"])
    has_second_order = name not in ("reptile", "imaml", "protonet")
    assert ("gradients/cosine_first_vs_second" in curves) == has_second_order
    layout = EventAccumulator(str(tmp_path / "run")).Reload().Tensors("custom_scalars__config__")[0].tensor_proto
    assert (b"Second order" in layout.string_val[0]) == has_second_order, "no chart stays empty"
    assert ("gradients/cg_residual" in curves) == (name == "imaml")
    assert ("optimizer/learned_lr/mean" in curves) == (name in ("meta_sgd", "maml_pp"))


def test_maml_pp_resumes_bitwise_equal(tmp_path: Path) -> None:
    # Annealing, learned rates and statistics are in the state, or follow from the meta-step.
    run(tmp_path / "whole", *tiny("maml_pp"))
    run_interrupted(tmp_path / "halves", 3, *tiny("maml_pp"))
    run(tmp_path / "halves", *tiny("maml_pp"), "run.resume=true")
    assert_runs_equal(tmp_path / "halves", tmp_path / "whole")


def test_maml_pp_anneals_and_tracks_statistics(tmp_path: Path) -> None:
    overrides = [*tiny("maml_pp"), "algorithm.first_order_share=0.5"]
    experiment = build_experiment(train_config(*overrides))
    episodes = experiment.train.tasks(0, 2)
    for iteration in (0, 3):
        got = experiment.meta_gradient(experiment.theta, episodes, iteration).grads
        inner = experiment.algorithm.inner_at(iteration / 4)
        assert inner.second_order == (iteration == 3)
        expected = meta_gradient(experiment.forward, experiment.theta, episodes, inner).grads
        assert relative_error(got, expected) < 1e-6
    run(tmp_path / "run", *overrides)
    best = load_best(tmp_path / "run", like=experiment.theta, device=experiment.device)
    kept = experiment.norm_statistics(best.params, best.iteration)
    assert kept
    for name, value in kept.items():
        torch.testing.assert_close(best.params[name], value)


@pytest.mark.parametrize("rule", ["momentum", "nesterov", "adam"])
def test_every_rule_trains(rule: str, tmp_path: Path) -> None:
    more = [f"inner.optimizer={rule}", "inner.lr=0.01", "inner.weight_decay=0.01", "inner.clip_norm=1"]
    assert run(tmp_path / "run", *tiny("maml"), *more)["iterations"] == 4


@pytest.mark.parametrize("backend", ["learn2learn", "higher", "torchopt"])
@pytest.mark.parametrize("name", ["maml", "meta_sgd"])
def test_baseline_library_takes_the_same_steps(name: str, backend: str, tmp_path: Path) -> None:
    spelt = "TorchOpt" if backend == "torchopt" else backend
    if spelt not in installed_peers()[0] or (name == "meta_sgd" and backend != "learn2learn"):
        pytest.skip(f"{backend} is not installed, or has no Meta-SGD")
    curves = []
    for by in ("metalearn", backend):
        metrics = run(tmp_path / by, *tiny(name), f"algorithm.backend={by}")
        assert metrics["backend"] == by
        curves.append(read_scalars(tmp_path / by))
    assert curves[0].keys() == curves[1].keys(), "the same scalars"
    ours, theirs = ([p.value for p in c["loss/query"]] for c in curves)
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_sinusoids_train(tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", "experiment=sinusoid", "inner.eval_steps=2", *TINY[4:5], *TINY[6:])
    assert metrics["score"] == "mse"
    assert len(metrics["test.mse_per_step"]) == 3
    assert "test.accuracy" not in metrics
    assert "mse/validation" in read_scalars(tmp_path / "run")
    assert Image.open(tmp_path / "run" / "sinusoid.png").size[0] > 800


def test_is_better_never_prefers_a_nonfinite_score() -> None:
    for metric, good, bad in ((MSE, 0.1, 0.2), (ACCURACY, 0.9, 0.8)):
        assert metric.is_better(good, bad)
        assert not metric.is_better(bad, good)
        for other in (math.nan, math.inf):
            assert metric.is_better(bad, other)
            assert not metric.is_better(other, bad)


def test_divergence_beyond_the_test_steps_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = ["inner.lr=5", "inner.eval_steps=1", "outer.iterations=2", "eval.every=1"]
    metrics = run(tmp_path / "run", "experiment=sinusoid", *more, *TINY[7:9])
    assert metrics["iterations"] == 2
    assert "no sinusoid.png: the support loss" in caplog.text
    more[1] = "inner.eval_steps=30"
    metrics = run(tmp_path / "far", "experiment=sinusoid", *more, *TINY[7:9])
    assert metrics["test.mse"] is None, "JSON has no NaN"
    assert "The validation mse is nan from inner step" in caplog.text


def test_auto_engine_plans_for_the_peak_memory_inner_loop() -> None:
    algorithm = build_experiment(train_config(*TINY, "algorithm=maml_pp")).algorithm
    assert algorithm.peak_memory_inner.second_order
    assert algorithm.peak_memory_inner.query_weights is not None
    assert not algorithm.inner_at(0.0).second_order


def test_norm_statistics_do_not_depend_on_chunks() -> None:
    found = []
    for chunk in ("null", "1"):
        experiment = build_experiment(train_config(*TINY, "algorithm=maml_pp", f"inner.task_chunk={chunk}"))
        found.append(experiment.norm_statistics(experiment.theta, 3))
    assert found[0].keys() == found[1].keys() != set()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_failed_process_reports_the_same_metric_names(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build_experiment(train_config(*tiny("imaml")))
    episodes = experiment.train.tasks(0, 2)
    sound = step._local_gradient(experiment, experiment.theta, episodes, 0)

    def failing(*args: Any) -> Any:
        raise NonFiniteLossError("query", task=0, step=2, value=math.nan, before=None)

    monkeypatch.setattr(Experiment, "meta_gradient", failing)
    failed = step._local_gradient(experiment, experiment.theta, episodes, 0)
    assert list(sound.metrics) == list(failed.metrics)
    assert "cg_residual" in failed.metrics


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=cavia", "model.context=0"], "algorithm=cavia with model=conv4: it adapts context parameters"),
        (["model.context=5"], "model.context=5: only algorithm=cavia"),
        (["algorithm=protonet", "experiment=sinusoid"], "prototypes are of classes"),
        (["algorithm=reptile", "inner.steps=0"], "inner.steps=0 with algorithm=reptile"),
        (["algorithm=maml_pp", "run.cuda_graph=true"], "changes as the training goes on"),
        (["algorithm=imaml", "algorithm.backend=higher"], "algorithm.backend=higher with algorithm=imaml"),
        (["algorithm.backend=higher", "inner.engine=adjoint"], "inner.engine=adjoint with algorithm.backend=higher"),
        (["algorithm.backend=higher", "algorithm=meta_sgd"], "algorithm=meta_sgd: higher is trained with for comp"),
        (["algorithm.backend=torchopt", "inner.clip_norm=1"], "inner.clip_norm=1.0 with algorithm.backend=torchopt"),
        (["algorithm.backend=learn2learn", "inner.optimizer=adam"], "inner.optimizer=adam with algorithm.backend"),
        (["algorithm=protonet", "inner.optimizer=adam"], "no step is taken by it"),
        (["algorithm=reptile", "inner.second_order=true"], "inner.second_order=true with algorithm=reptile"),
        (["algorithm=protonet", "inner.second_order=true"], "inner.second_order=true with algorithm=protonet"),
        (["algorithm=imaml", "inner.engine=auto"], "inner.engine=auto with algorithm=imaml"),
        (["algorithm=maml_pp", "model=mlp", "model.batch_norm=false"], "algorithm.per_step_affine=true with model.ba"),
    ],
)
def test_incompatible_settings_raise(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_config(*overrides)


def test_comparison_of_algorithms_holds_all_of_them() -> None:
    config = to_dataclass(compose("compare", ["comparison=algorithms"]), CompareConfig)
    variants = [split(text) for text in config.compare.variants]
    assert {v[0] for v in variants} == {f"algorithm={name}" for name in ALGORITHMS}
    for overrides in variants:
        train_config(*overrides)


def test_comparison_raises_for_regression() -> None:
    config = to_dataclass(compose("compare", ["experiment=sinusoid"]), CompareConfig)
    with pytest.raises(ConfigError, match="data=sinusoid: a comparison is of accuracies"):
        check_compare(config)


def test_maml_pp_is_a_row_of_the_reproduced_table(tmp_path: Path) -> None:
    settings = ["experiment_name=omniglot_5way_1shot_maml_pp", "orders=[second]", "seeds=[0]"]
    [row] = build_rows(to_dataclass(compose("reproduce", settings), ReproduceConfig), tmp_path)
    assert row.jobs[0].config.algorithm.name == "maml_pp"
    assert str(published("maml_pp", "second", 5, 1)) == "99.47% (Antoniou et al. 2019)"


def test_missing_library_raises_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> Any:
        return {}, dict.fromkeys(("learn2learn", "higher", "TorchOpt"), "not installed")

    monkeypatch.setattr("metalearn.metagrad.baselines.backend.installed_peers", none)
    with pytest.raises(ConfigError, match=r"learn2learn.*pip install -r requirements-peers\.txt"):
        build_experiment(train_config(*TINY, "algorithm.backend=learn2learn"))
