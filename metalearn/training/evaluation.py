"""Scores of the adapted model on held-out tasks after each inner step, with 95% intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_leaves, tree_map

from metalearn.core.types import Episodes, Examples, Forward, Loss, Params
from metalearn.data.sampler import TaskSampler
from metalearn.inner import InnerLoop, init_state, inner_step, params_at_step, predict
from metalearn.inner.batch_norm_statistics import (
    ChannelMoments,
    record_statistics,
    statistics_at,
    statistics_to_params,
    with_fixed_statistics,
)
from metalearn.inner.batching import is_batchable, over_tasks

_IMAGES_PER_PASS = 4096  # bounds the memory of non-transductive prediction
_NONTRANSDUCTIVE_QUERIES = 25  # of a task: each takes a pass over the support set


@dataclass(frozen=True)
class Metric:
    """A loss to train with and a score to judge tasks by.

    Args:
        name: in ``metrics.json`` and TensorBoard.
        per_task: maps predictions ``[T, Q, ...]`` and targets ``[T, Q, ...]`` to scores ``[T]``.
        as_percent: whether the score is a fraction that is printed as a percentage.
        highest: largest possible score; the smallest is 0.
    """

    name: str
    loss: Loss
    per_task: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool
    as_percent: bool
    highest: float

    def is_better(self, a: float, b: float) -> bool:
        """Return whether ``a`` beats ``b``; non-finite scores always lose."""
        if not (math.isfinite(a) and math.isfinite(b)):
            return math.isfinite(a)
        return a > b if self.higher_is_better else a < b

    def format(self, value: float, *, digits: int = 2) -> str:
        """Return a score as text for tables."""
        return f"{value:.{digits}%}" if self.as_percent else f"{value:.{digits + 2}g}"


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction of correct predictions per task: ``[T, Q, N]`` and ``[T, Q]`` to ``[T]``."""
    return (logits.argmax(dim=-1) == labels).float().mean(dim=-1)


def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error per task: both ``[T, Q, ...]`` to ``[T]``."""
    return (predictions - targets).square().flatten(1).mean(dim=1)


ACCURACY = Metric("accuracy", cross_entropy, accuracy, higher_is_better=True, as_percent=True, highest=1.0)
MSE = Metric("mse", mse_loss, squared_error, higher_is_better=False, as_percent=False, highest=math.inf)


@dataclass(frozen=True)
class MeanCI:
    """A mean over tasks and the half-width of its 95% interval, 1.96 standard errors.

    The half-width may reach beyond the possible scores. ``ends`` cuts it there, which leaves out only values that the
    true mean cannot have, so that the interval covers it as often as before.

    Examples:
        >>> print(MeanCI(0.95, 0.02), MeanCI(0.95, 0.08), sep=", ")
        95.00% ± 2.00%, 95.00% (87 to 100%)
    """

    mean: float
    ci95: float

    @classmethod
    def of(cls, values: Tensor) -> MeanCI:
        """Return the mean and interval of one value per task, ``[tasks]``, at least two."""
        return cls(values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5)

    def __str__(self) -> str:
        return self.format(ACCURACY)

    def ends(self, lowest: float, highest: float) -> tuple[float, float]:
        """Return the ends of the interval, cut at the lowest and the highest possible mean."""
        return max(self.mean - self.ci95, lowest), min(self.mean + self.ci95, highest)

    def is_cut(self, lowest: float, highest: float) -> bool:
        """Return whether the interval reaches beyond the possible means."""
        return self.mean - self.ci95 < lowest or self.mean + self.ci95 > highest

    def format(self, metric: Metric) -> str:
        """Return mean and half-width as text for tables, or the ends of the interval where it is cut."""
        if metric.as_percent and self.is_cut(0, metric.highest):
            low, high = (round(100 * end, 2) for end in self.ends(0, metric.highest))
            return f"{metric.format(self.mean)} ({low:g} to {high:g}%)"
        return f"{metric.format(self.mean)} ± {metric.format(self.ci95)}"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of every task, so that two models can be compared on the same tasks.

    Args:
        scores: ``[inner steps + 1, tasks]``, each query set predicted as one batch (transductive BatchNorm).
        nontransductive_scores: ``[tasks]``, after the last step, each query predicted without seeing the others.
    """

    scores: Tensor
    nontransductive_scores: Tensor | None
    metric: Metric = ACCURACY

    @property
    def episodes(self) -> int:
        """Number of tasks."""
        return self.scores.shape[1]

    @property
    def per_step(self) -> list[MeanCI]:
        """Mean scores after 0, 1, ... inner steps."""
        return [MeanCI.of(values) for values in self.scores]

    @property
    def nontransductive(self) -> MeanCI | None:
        """Mean score after the last inner step, each query predicted without the others."""
        return None if self.nontransductive_scores is None else MeanCI.of(self.nontransductive_scores)

    @property
    def final(self) -> MeanCI:
        """Mean transductive score after the last inner step, the number that papers on MAML report."""
        return self.per_step[-1]


@torch.no_grad()
def evaluate(
    forward: Forward,
    params: Params,
    sampler: TaskSampler,
    inner: InnerLoop,
    *,
    episodes: int,
    first: int = 0,
    batch: int,
    nontransductive: bool,
    metric: Metric = ACCURACY,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Adapt to ``episodes`` of the sampler's tasks, from number ``first``, and predict their queries.

    ``batch`` tasks are taken at a time, which changes the result only by rounding; ``progress`` is called with the
    number done. With ``nontransductive`` each query is predicted on its own as well: with the statistics of ``params``,
    or in a batch of the support set and itself. Of more than 25 queries a task, 25 are predicted so, evenly spaced.
    """
    scores: list[list[Tensor]] = [[] for _ in range(inner.steps + 1)]
    nontransductive_scores: list[Tensor] = []
    for done in range(0, episodes, batch):
        tasks = sampler.tasks(first + done, min(batch, episodes - done))
        for step, fast in enumerate(_fast_by_step(forward, params, tasks, inner, metric.loss)):
            scores[step].append(metric.per_task(predict(forward, fast, tasks.query_x), tasks.query_y))
        if nontransductive:
            few = _some_queries(tasks, _NONTRANSDUCTIVE_QUERIES)
            predictions = predict_nontransductive(forward, fast, few, statistics_at(params, inner.steps))
            nontransductive_scores.append(metric.per_task(predictions, few.query_y))
        progress(min(done + batch, episodes))
    return Evaluation(
        torch.stack([torch.cat(values) for values in scores]),
        torch.cat(nontransductive_scores) if nontransductive else None,
        metric,
    )


def _some_queries(tasks: Episodes, count: int) -> Episodes:
    """Return the tasks with at most ``count`` queries, evenly spaced: of every class, as queries come by class."""
    queries = tree_leaves(tasks.query_x)[0].shape[1]
    chosen = torch.arange(min(count, queries)) * queries // min(count, queries)
    query_x, query_y = tree_map(lambda leaf: leaf[:, chosen], (tasks.query_x, tasks.query_y))
    return dataclasses.replace(tasks, query_x=query_x, query_y=query_y)


def predict_nontransductive(
    forward: Forward, fast: Params, episodes: Episodes, statistics: list[ChannelMoments] | None = None
) -> Any:
    """Predict every query in a batch of the support set and itself, or by fixed statistics, ``[T, Q, ...]``.

    BatchNorm then learns nothing from the other queries (Nichol et al. 2018, arXiv 1803.02999, section 6.1). A model
    without batch statistics predicts the same either way.
    """
    if statistics:
        return predict(with_fixed_statistics(forward, statistics), fast, episodes.query_x)

    def one_query(params: Params, support_x: Examples, query: Examples) -> Examples:
        batch = tree_map(lambda support, one: torch.cat([support, one.unsqueeze(0)]), support_x, query)
        return tree_map(lambda prediction: prediction[-1], forward(params, batch))

    tasks, support = tree_leaves(episodes.support_x)[0].shape[:2]
    queries_per_pass = max(1, _IMAGES_PER_PASS // (tasks * (support + 1)))
    each_query = torch.vmap(one_query, in_dims=(None, None, 0), chunk_size=queries_per_pass, randomness="different")

    def one_task(params: Params, support_x: Examples, queries: Examples) -> Examples:
        if is_batchable(forward):
            return each_query(params, support_x, queries)
        count = len(tree_leaves(queries)[0])
        each = [one_query(params, support_x, tree_map(lambda leaf, q=q: leaf[q], queries)) for q in range(count)]
        return tree_map(lambda *predictions: torch.stack(predictions), *each)

    return over_tasks(one_task, fast, episodes.support_x, episodes.query_x, model=forward)


@torch.no_grad()
def collect_norm_statistics(
    forward: Forward, params: Params, tasks: Episodes, inner: InnerLoop, *, loss: Loss
) -> Params:
    """Return BatchNorm's input statistics on the queries after 0, 1, ... inner steps, as entries of theta."""
    by_step = _fast_by_step(forward, params, tasks, inner, loss)
    return statistics_to_params([record_statistics(forward, fast, tasks.query_x) for fast in by_step])


def _fast_by_step(forward: Forward, params: Params, tasks: Episodes, inner: InnerLoop, loss: Loss) -> Iterator[Params]:
    """Yield the adapted parameters after 0, 1, ... inner steps."""
    state = init_state(forward, params, tasks.support_x, tasks.support_y, inner)
    yield params_at_step(state, inner, 0)
    for k in range(inner.steps):
        state, _ = inner_step(forward, state, tasks.support_x, tasks.support_y, inner, loss=loss, k=k)
        yield params_at_step(state, inner, k + 1)
