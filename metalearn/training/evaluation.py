"""How well the adapted model does on held-out tasks, after each inner step, with its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metalearn.core.types import Episodes, Forward, Loss, Params
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
from metalearn.training.scores import ACCURACY, Metric

_IMAGES_PER_PASS = 4096  # of non-transductive prediction; bounds its memory


@dataclass(frozen=True)
class MeanCI:
    """A mean over tasks and the half-width of its 95% interval, 1.96 standard errors."""

    mean: float
    ci95: float

    @classmethod
    def of(cls, values: Tensor) -> MeanCI:
        """From one value per task, ``[tasks]``, at least two."""
        return cls(values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5)

    def __str__(self) -> str:
        return self.text(ACCURACY)

    def text(self, score: Metric) -> str:
        """In words of tables."""
        return f"{score.text(self.mean)} ± {score.text(self.ci95)}"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores (accuracies as fractions), task by task, so that two models can be compared on the same tasks.

    Args:
        by_task: ``[inner steps + 1, tasks]``, after 0, 1, ... steps, each query set predicted as one batch
            (transductive BatchNorm).
        alone: ``[tasks]``, after the last step, each query predicted without seeing the others; ``None`` if not asked.
        score: what they are.
    """

    by_task: Tensor
    alone: Tensor | None
    score: Metric = ACCURACY

    @property
    def episodes(self) -> int:
        """Number of tasks."""
        return self.by_task.shape[1]

    @property
    def per_step(self) -> list[MeanCI]:
        """After 0, 1, ... inner steps."""
        return [MeanCI.of(values) for values in self.by_task]

    @property
    def nontransductive(self) -> MeanCI | None:
        """After the last inner step, each query predicted without the others."""
        return None if self.alone is None else MeanCI.of(self.alone)

    @property
    def final(self) -> MeanCI:
        """After the last inner step, transductive: the figure that papers on MAML report."""
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
    score: Metric = ACCURACY,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Adapt to ``episodes`` of the sampler's tasks and predict their queries.

    Args:
        forward: one task's model.
        params: meta-parameters.
        sampler: of classes that were not trained on.
        inner: step size and number of steps.
        episodes: number of tasks.
        first: index of the first.
        batch: tasks at a time; the result does not depend on it beyond rounding.
        nontransductive: whether to predict each query on its own as well: by the statistics that ``params`` keep, or
            in a batch of the support set and itself.
        score: what tasks are judged by.
        progress: called with the number of tasks done.
    """
    per_step: list[list[Tensor]] = [[] for _ in range(inner.steps + 1)]
    alone: list[Tensor] = []
    for done in range(0, episodes, batch):
        tasks = sampler.tasks(first + done, min(batch, episodes - done))
        carry = init_state(forward, params, tasks.support_x, tasks.support_y, inner)
        for step in range(inner.steps + 1):
            if step > 0:
                carry, _ = inner_step(
                    *(forward, carry, tasks.support_x, tasks.support_y, inner), loss=score.loss, k=step - 1
                )
            fast = params_at_step(carry, inner, step)
            per_step[step].append(score.of(predict(forward, fast, tasks.query_x), tasks.query_y))
        if nontransductive:
            statistics = statistics_at(params, inner.steps)
            alone.append(score.of(predict_nontransductive(forward, fast, tasks, statistics), tasks.query_y))
        progress(min(done + batch, episodes))
    by_task = torch.stack([torch.cat(values) for values in per_step])
    return Evaluation(by_task, torch.cat(alone) if nontransductive else None, score)


def predict_nontransductive(
    forward: Forward, fast: Params, episodes: Episodes, statistics: list[ChannelMoments] | None = None
) -> Tensor:
    """Predict every query in a batch of the support set and itself, ``[T, Q, ...]``; or by BatchNorm's statistics.

    BatchNorm then learns nothing from the other queries (Nichol et al. 2018, arXiv 1803.02999, section 6.1). A model
    without statistics over the batch predicts the same either way.
    """
    if statistics:
        return predict(with_fixed_statistics(forward, statistics), fast, episodes.query_x)

    def one_query(params: Params, support_x: Tensor, query: Tensor) -> Tensor:
        return forward(params, torch.cat([support_x, query.unsqueeze(0)]))[-1]

    tasks, support = episodes.support_x.shape[:2]
    queries_per_pass = max(1, _IMAGES_PER_PASS // (tasks * (support + 1)))
    each = torch.vmap(one_query, in_dims=(None, None, 0), chunk_size=queries_per_pass, randomness="different")

    def one_task(params: Params, support_x: Tensor, queries: Tensor) -> Tensor:
        if is_batchable(forward):
            return each(params, support_x, queries)
        return torch.stack([one_query(params, support_x, query) for query in queries])

    predictions: Tensor = over_tasks(one_task, fast, episodes.support_x, episodes.query_x, model=forward)
    return predictions


@torch.no_grad()
def collect_norm_statistics(
    forward: Forward, params: Params, tasks: Episodes, inner: InnerLoop, *, loss: Loss
) -> Params:
    """Statistics of BatchNorm's inputs when the queries pass after 0, 1, ... inner steps, as entries of theta."""
    carry = init_state(forward, params, tasks.support_x, tasks.support_y, inner)
    by_step = []
    for k in range(inner.steps + 1):
        if k > 0:
            carry, _ = inner_step(forward, carry, tasks.support_x, tasks.support_y, inner, loss=loss, k=k - 1)
        by_step.append(record_statistics(forward, params_at_step(carry, inner, k), tasks.query_x))
    return statistics_to_params(by_step)
