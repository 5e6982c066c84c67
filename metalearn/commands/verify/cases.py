"""What the engines are tried on: small models, random images, and how an engine is set.

Everything is drawn in float32 on the CPU and then moved, so that every device and dtype gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metalearn.commands.verify.attention import PatchTransformer
from metalearn.commands.verify.residual import ResidualNet
from metalearn.core.functional import functionalize
from metalearn.core.types import Episodes, Forward, Params
from metalearn.inner import InnerLoop, adapt, predict
from metalearn.metagrad import meta_gradient
from metalearn.models import MLP, Conv4

_TASKS, _WAYS, _EACH, _LR = 3, 3, 4, 0.05
"""Four examples a class, in support and in query: BatchNorm over one or two is too kinked for differences."""


@dataclass(frozen=True)
class TestModel:
    """A model that the engines are tried on, and how the engines are set.

    Args:
        name: in the table.
        module: makes one.
        task_chunk: as in ``InnerLoop``.
        snapshot_every: as in ``InnerLoop``.
        random: whether it draws random numbers: another library, and another dtype, would draw others.
        stopped: whether it stops gradients on the way: then they are not what differences show.
    """

    name: str
    module: Callable[[], nn.Module]
    task_chunk: int | None = None
    snapshot_every: int = 1
    random: bool = False
    stopped: bool = False


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, _WAYS))


class _Stopped(nn.Module):
    """Stops the gradient at a mean by ``torch.no_grad()``, which forward mode does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(28 * 28, 16), nn.Linear(16, _WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x.flatten(1))
        with torch.no_grad():
            mean = h.mean(dim=0)
        logits: Tensor = self.head(torch.tanh(h - mean))
        return logits


SUBJECTS = (
    TestModel("conv4", lambda: Conv4(_WAYS, width=4)),
    TestModel("mlp", lambda: MLP(28 * 28, _WAYS, hidden=(16, 8))),
    TestModel("attention", lambda: PatchTransformer(_WAYS, patch=14, width=8, heads=2)),
    TestModel("residual", lambda: ResidualNet(_WAYS, width=4)),
    TestModel("in parts", lambda: Conv4(_WAYS, width=4), task_chunk=2, snapshot_every=2),
    TestModel("dropout", _dropout, snapshot_every=2, random=True),
    TestModel("no_grad", _Stopped, stopped=True),
)
"""``in parts`` is conv4 in chunks of two tasks, where only every other step's fast weights are kept."""


@dataclass(frozen=True)
class NumericSetting:
    """Where and in which dtype the engines are tried; ``seed`` is that of parameters, images and dropout."""

    dtype: torch.dtype
    device: torch.device
    seed: int


@dataclass(frozen=True)
class Case:
    """A subject at one order and one K: a row of the table."""

    subject: TestModel
    second_order: bool
    steps: int

    @property
    def name(self) -> str:
        """In full."""
        return f"{self.subject.name}, {'second' if self.second_order else 'first'} order, K={self.steps}"

    def inner(self, engine: str) -> InnerLoop:
        """The inner loop of an engine that is tried."""
        chunk, every = self.subject.task_chunk, self.subject.snapshot_every
        return InnerLoop(_LR, self.steps, self.second_order, engine, task_chunk=chunk, snapshot_every=every)

    @property
    def plain(self) -> InnerLoop:
        """The inner loop of the reference: ``unroll``, all tasks at once."""
        return InnerLoop(_LR, self.steps, self.second_order, "unroll")


@dataclass(frozen=True, eq=False)
class VerificationProblem:
    """A case with its model and tasks."""

    case: Case
    setting: NumericSetting
    module: nn.Module
    episodes: Episodes
    forward: Forward
    theta: Params

    @classmethod
    def pose(cls, case: Case, setting: NumericSetting) -> VerificationProblem:
        """Random parameters and images, with labels in class order."""
        torch.manual_seed(setting.seed)
        module = case.subject.module().to(device=setting.device, dtype=setting.dtype)
        images = torch.rand(2, _TASKS, _WAYS * _EACH, 1, 28, 28).to(device=setting.device, dtype=setting.dtype)
        labels = torch.arange(_WAYS, device=setting.device).repeat_interleave(_EACH).repeat(_TASKS, 1)
        return cls(case, setting, module, Episodes(images[0], labels, images[1], labels), *functionalize(module))

    def grads(self, inner: InnerLoop) -> Params:
        """The meta-gradient; whoever computes it, dropout draws the same."""
        torch.manual_seed(self.setting.seed)
        grads = meta_gradient(self.forward, self.theta, self.episodes, inner).grads
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize(self.setting.device)
        return grads

    def adapted(self, theta: Params) -> Params:
        """The fast weights at theta; after it the generators stand where the query pass finds them in an engine."""
        torch.manual_seed(self.setting.seed)
        return adapt(self.forward, theta, self.episodes.support_x, self.episodes.support_y, self.case.plain)

    def query_loss(self, fast: Params) -> Tensor:
        """Mean over tasks, which all have the same number of queries: one task after the other, unlike the engines.

        Dropout has to be batched as it is there, to draw the same.
        """
        x, y = self.episodes.query_x, self.episodes.query_y
        if self.case.subject.random:
            predictions = predict(self.forward, fast, x)
        else:
            own = ({name: w[t] for name, w in fast.items()} for t in range(_TASKS))
            predictions = torch.stack([self.forward(params, x[t]) for t, params in enumerate(own)])
        return cross_entropy(predictions.flatten(0, 1), y.flatten())
