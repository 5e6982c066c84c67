"""Accuracy per task and step, its interval, and the two BatchNorm protocols."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metalearn import Forward, InnerLoop, Params, adapt, functionalize
from metalearn.core.params import expand_over_tasks
from metalearn.data.glyphs import make_glyphs
from metalearn.data.sampler import EpisodeSampler, TaskShape
from metalearn.inner import predict
from metalearn.models import MLP, Conv4
from metalearn.training.evaluation import MeanCI, accuracy, evaluate, predict_nontransductive
from tests.factories import image_episodes


def sampler() -> EpisodeSampler:
    return EpisodeSampler(make_glyphs(classes=20), TaskShape(5, 1, 4), seed=0, split="test")


def test_interval_is_1_96_standard_errors() -> None:
    estimate = MeanCI.of(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert estimate.mean == 0.75
    assert estimate.ci95 == pytest.approx(1.96 * 0.5 / 2)  # standard deviation 0.5, with n - 1
    assert str(estimate) == "75.00% (26 to 100%)", "cut at 100%"


def test_accuracy_is_per_task() -> None:
    logits = torch.eye(3).repeat(2, 1, 1)
    assert accuracy(logits, torch.tensor([[0, 1, 2], [0, 0, 0]])).tolist() == [1.0, pytest.approx(1 / 3)]


def test_accuracy_per_step_equals_adapting_that_far() -> None:
    forward, theta = functionalize(Conv4(5, width=8))
    inner = InnerLoop(lr=0.4, steps=3, second_order=False)
    result = evaluate(forward, theta, sampler(), inner, episodes=10, batch=4, nontransductive=False)
    assert len(result.per_step) == 4
    assert result.episodes == 10
    assert result.nontransductive is None
    tasks = sampler().tasks(0, 10)
    for steps, estimate in enumerate(result.per_step):
        fast = adapt(forward, theta, tasks.support_x, tasks.support_y, InnerLoop(lr=0.4, steps=steps))
        logits = [forward({n: w[t] for n, w in fast.items()}, tasks.query_x[t]) for t in range(10)]
        right = torch.stack(logits).argmax(-1) == tasks.query_y
        assert estimate.mean == pytest.approx(right.double().mean().item())
    assert result.final == result.per_step[3]
    assert result.final.mean > result.per_step[0].mean + 0.1, "adaptation must help"


def test_evaluate_does_not_depend_on_the_batch() -> None:
    forward, theta = functionalize(Conv4(5, width=8))
    inner = InnerLoop(lr=0.4, steps=1, second_order=False)
    means = []
    for batch in (1, 4, 9):
        result = evaluate(forward, theta, sampler(), inner, episodes=9, batch=batch, nontransductive=True)
        assert result.episodes == 9
        assert result.nontransductive is not None
        means.append([estimate.mean for estimate in (*result.per_step, result.nontransductive)])
    for other in means[1:]:
        assert other == pytest.approx(means[0], abs=0.012), "rounding may tip two queries of 180"


@pytest.mark.parametrize("images_per_pass", [4096, 1])
def test_nontransductive_prediction_equals_a_loop_over_queries(
    images_per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metalearn.training.evaluation._IMAGES_PER_PASS", images_per_pass)
    forward, theta = functionalize(Conv4(3, width=4).double())
    episodes = image_episodes()
    got = predict_nontransductive(forward, expand_over_tasks(theta, episodes.tasks), episodes)
    for t in range(episodes.tasks):
        for q in range(episodes.query_x.shape[1]):
            batch = torch.cat([episodes.support_x[t], episodes.query_x[t, q : q + 1]])
            torch.testing.assert_close(got[t, q], forward(theta, batch)[-1])


def test_protocols_differ_only_with_batch_norm() -> None:
    episodes = image_episodes(queries=4)

    def gap(module: nn.Module) -> float:
        forward, theta = functionalize(module.double())
        fast = expand_over_tasks(theta, episodes.tasks)
        alone = predict_nontransductive(forward, fast, episodes)
        together = torch.vmap(forward)(fast, episodes.query_x)
        return (alone - together).abs().max().item()

    assert gap(MLP(784, 3, hidden=(8,), batch_norm=False)) < 1e-12
    assert gap(MLP(784, 3, hidden=(8,), batch_norm=True)) > 1e-2


def test_evaluate_keeps_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, theta = functionalize(MLP(784, 5, hidden=(4,)))
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    graphs: list[bool] = []

    def spy(forward: Forward, fast: Params, x: Tensor) -> Tensor:
        graphs.append(predict(forward, fast, x).requires_grad)
        return predict(forward, fast, x)

    monkeypatch.setattr("metalearn.training.evaluation.predict", spy)
    inner = InnerLoop(lr=0.1, steps=1, second_order=False)
    evaluate(forward, theta, sampler(), inner, episodes=4, batch=2, nontransductive=True)
    assert set(graphs) == {False}


def test_of_many_queries_some_of_every_class_are_predicted_alone() -> None:
    forward, theta = functionalize(Conv4(5, width=4))
    many = EpisodeSampler(make_glyphs(classes=20), TaskShape(5, 1, 13), seed=0, split="test")
    inner = InnerLoop(lr=0.4, steps=1)
    result = evaluate(forward, theta, many, inner, episodes=3, batch=3, nontransductive=True)
    tasks = many.tasks(0, 3)
    chosen = [65 * i // 25 for i in range(25)]
    assert {int(y) for y in tasks.query_y[0, chosen]} == set(range(5))
    fast = adapt(forward, theta, tasks.support_x, tasks.support_y, inner)
    right = predict_nontransductive(forward, fast, tasks).argmax(-1) == tasks.query_y
    assert result.nontransductive is not None
    assert result.nontransductive.mean == pytest.approx(right[:, chosen].double().mean().item(), abs=0.012)
