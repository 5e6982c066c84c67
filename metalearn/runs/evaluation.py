"""Accuracy of the adapted model on held-out classes, after each inner step, with its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metalearn.data.sampler import TaskSampler
from metalearn.inner import InnerLoop, begin, inner_step, model_params, predict
from metalearn.types import Episodes, Forward, Params

_IMAGES_PER_PASS = 4096  # of non-transductive prediction; bounds its memory


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks and the half-width of its 95% interval, 1.96 standard errors."""

    mean: float
    ci95: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From one value per task, ``[tasks]``, at least two."""
        return cls(values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5)

    def __str__(self) -> str:
        return f"{self.mean:.2%} ± {self.ci95:.2%}"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Accuracies as fractions, task by task, so that two models can be compared on the same tasks.

    Args:
        by_task: ``[inner steps + 1, tasks]``, after 0, 1, ... steps, each query set predicted as one batch
            (transductive BatchNorm).
        alone: ``[tasks]``, after the last step, each query predicted without seeing the others; ``None`` if not asked.
    """

    by_task: Tensor
    alone: Tensor | None

    @property
    def episodes(self) -> int:
        """Number of tasks."""
        return self.by_task.shape[1]

    @property
    def per_step(self) -> list[Estimate]:
        """After 0, 1, ... inner steps."""
        return [Estimate.of(values) for values in self.by_task]

    @property
    def nontransductive(self) -> Estimate | None:
        """After the last inner step, each query predicted without the others."""
        return None if self.alone is None else Estimate.of(self.alone)

    @property
    def accuracy(self) -> Estimate:
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
        nontransductive: whether to predict each query on its own as well.
        progress: called with the number of tasks done.
    """
    per_step: list[list[Tensor]] = [[] for _ in range(inner.steps + 1)]
    alone: list[Tensor] = []
    for done in range(0, episodes, batch):
        tasks = sampler.tasks(first + done, min(batch, episodes - done))
        carry = begin(forward, params, tasks.support_x, tasks.support_y, inner)
        for step in range(inner.steps + 1):
            if step > 0:
                carry, _ = inner_step(
                    *(forward, carry, tasks.support_x, tasks.support_y, inner), loss=cross_entropy, k=step - 1
                )
            fast = model_params(carry, inner, step)
            per_step[step].append(accuracy(predict(forward, fast, tasks.query_x), tasks.query_y))
        if nontransductive:
            alone.append(accuracy(predict_one_by_one(forward, fast, tasks), tasks.query_y))
        progress(min(done + batch, episodes))
    by_task = torch.stack([torch.cat(values) for values in per_step])
    return Evaluation(by_task, torch.cat(alone) if nontransductive else None)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right predictions per task: ``[T, Q, N]`` and ``[T, Q]`` to ``[T]``."""
    return (logits.argmax(dim=-1) == labels).float().mean(dim=-1)


def predict_one_by_one(forward: Forward, fast: Params, episodes: Episodes) -> Tensor:
    """Predict every query in a batch of the support set and itself, ``[T, Q, ...]``.

    BatchNorm then learns nothing from the other queries (Nichol et al. 2018, arXiv 1803.02999, section 6.1). A model
    without statistics over the batch predicts the same either way.
    """

    def one_query(params: Params, support_x: Tensor, query: Tensor) -> Tensor:
        return forward(params, torch.cat([support_x, query.unsqueeze(0)]))[-1]

    tasks, support = episodes.support_x.shape[:2]
    queries_per_pass = max(1, _IMAGES_PER_PASS // (tasks * (support + 1)))
    one_task = torch.vmap(one_query, in_dims=(None, None, 0), chunk_size=queries_per_pass, randomness="different")
    predictions: Tensor = torch.vmap(one_task, randomness="different")(fast, episodes.support_x, episodes.query_x)
    return predictions
