"""Test problems for the engines: small models, random images, and the inner loops to compare.

All numbers are drawn in float32 on the CPU and then moved, so that every device and dtype gets the same ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from metalearn.config.commands_schema import VerifyConfig
from metalearn.core.functional import functionalize
from metalearn.core.module_checks import RUNNING_STATISTICS, BatchNormMode
from metalearn.core.types import Episodes, Forward, Params
from metalearn.inner import SGD, InnerLoop, UpdateRule, adapt, predict
from metalearn.metagrad import meta_gradient
from metalearn.models import MLP, Conv4
from metalearn.training.custom import build_custom_model, build_custom_rule, check_output_shape
from metalearn.training.state import seed_all

_TASKS, _WAYS, _EXAMPLES, _LR = 3, 3, 4, 0.05
"""Four examples a class: with one or two, BatchNorm makes the loss too kinked for finite differences."""


class PatchTransformer(nn.Module):
    """Patches to tokens, one pre-norm block of self-attention and an MLP (Dosovitskiy et al. 2021, eq. 1-4).

    Images ``[examples, channels, size, size]`` to logits ``[examples, ways]``; a patch has ``patch`` pixels squared, a
    token ``width`` features, a multiple of ``heads``.

    Raises:
        ValueError: if the patches do not fill the image.

    Examples:
        >>> PatchTransformer(ways=5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference: Dosovitskiy et al. 2021, arXiv 2010.11929.
    """

    def __init__(
        self, ways: int, *, channels: int = 1, size: int = 28, patch: int = 7, width: int = 32, heads: int = 4
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"PatchTransformer: patch={patch} does not divide size={size}.")
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[examples, ways]`` of images ``[examples, channels, size, size]``."""
        tokens = self.patches(x).flatten(start_dim=2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.block(tokens).mean(dim=1))
        return logits


class ResidualNet(nn.Module):
    """Blocks of ``x + f(x)`` with f two 3x3 convolutions (He et al. 2016, eq. 1), each with BatchNorm of the batch.

    Images ``[examples, channels, height, width]`` to logits ``[examples, ways]``; the stem halves both sides twice.

    Examples:
        >>> ResidualNet(ways=5)(torch.zeros(10, 1, 28, 28)).shape
        torch.Size([10, 5])

    Reference: He et al. 2016, arXiv 1512.03385.
    """

    def __init__(self, ways: int, *, channels: int = 1, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, kernel_size=5, stride=4, padding=2)
        self.blocks = nn.Sequential(*[_Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[examples, ways]`` of images ``[examples, channels, height, width]``."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(-2, -1)))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.first_norm = nn.BatchNorm2d(width, track_running_stats=False)
        self.second = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.second_norm = nn.BatchNorm2d(width, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = relu(self.first_norm(self.first(x)))
        return relu(x + self.second_norm(self.second(inside)))


class _StopGradient(nn.Module):
    """Stops the gradient at a mean by ``torch.no_grad()``, which forward mode ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(28 * 28, 16), nn.Linear(16, _WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x.flatten(1))
        with torch.no_grad():
            mean = h.mean(dim=0)
        logits: Tensor = self.head(torch.tanh(h - mean))
        return logits


class _RowLSTM(nn.Module):
    """Reads every fourth row of an image as a step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, 5, batch_first=True), nn.Linear(5, _WAYS)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x[:, 0, ::4])[0][:, -1])
        return logits


def _running_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    assert norm.running_var is not None
    nn.init.uniform_(norm.running_var, 0.1, 0.2)
    layers = nn.Conv2d(1, 4, kernel_size=5, stride=4), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, _WAYS)
    return nn.Sequential(*layers)


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, _WAYS))


@dataclass(frozen=True)
class ModelCase:
    """A factory of a model to test the engines on, and the engines' settings.

    Args:
        batch_norm: as ``functionalize`` takes it.
        is_stochastic: the model draws random numbers, which are others in another library or dtype.
        stops_gradient: the model blocks part of the gradient, so that it differs from finite differences.
        rule: the update rule; other libraries are compared with plain gradient steps alone.
    """

    name: str
    module: Callable[[], nn.Module]
    task_chunk: int | None = None
    checkpoint_every: int = 1
    batch_norm: BatchNormMode | None = None
    is_stochastic: bool = False
    stops_gradient: bool = False
    example_shape: tuple[int, ...] = (1, 28, 28)
    rule: UpdateRule = field(default_factory=SGD, compare=False)


MODEL_CASES = (
    ModelCase("conv4", lambda: Conv4(_WAYS, width=4)),
    ModelCase("mlp", lambda: MLP(28 * 28, _WAYS, hidden=(16, 8))),
    ModelCase("attention", lambda: PatchTransformer(_WAYS, patch=14, width=8, heads=2)),
    ModelCase("residual", lambda: ResidualNet(_WAYS, width=4)),
    ModelCase("lstm", _RowLSTM),
    ModelCase("bn task", _running_norm, batch_norm="task"),
    ModelCase("bn frozen", _running_norm, batch_norm="frozen"),
    ModelCase("in parts", lambda: Conv4(_WAYS, width=4), task_chunk=2, checkpoint_every=2),
    ModelCase("dropout", _dropout, checkpoint_every=2, is_stochastic=True),
    ModelCase("no_grad", _StopGradient, stops_gradient=True),
)
"""``in parts`` is conv4 in chunks of two tasks with checkpoints at every other step."""


def custom_cases(config: VerifyConfig) -> list[ModelCase]:
    """Return the case of the user's model, update rule or both; of a rule alone with ``mlp``; none if none is named.

    Raises:
        ConfigError: if there is no such code, or it makes something else.
    """
    if not config.targets():
        return []
    rule_target = config.inner.optimizer_target
    rule = build_custom_rule(rule_target, config.inner.optimizer_options) if rule_target else SGD()
    target, options, batch_norm = config.model.target, config.model.options, config.model.batch_norm
    shape = torch.Size(config.verify.example_shape)
    labels = [name.partition(":")[2] for name in (target or ":mlp", rule_target) if name]
    if target is None:
        return [replace(next(case for case in MODEL_CASES if case.name == "mlp"), name=", ".join(labels), rule=rule)]
    module = build_custom_model(target, options, shape, _WAYS)
    check_output_shape(module, f"model.target={target}", shape, _WAYS, batch_norm)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        module(torch.zeros(2, *shape))
        draws = not torch.equal(torch.get_rng_state(), before)
    make = partial(build_custom_model, target, options, shape, _WAYS)
    case = ModelCase(", ".join(labels), make, batch_norm=batch_norm, is_stochastic=draws, rule=rule)
    return [replace(case, example_shape=tuple(shape))]


def _with_statistics(module: nn.Module, batch_norm: BatchNormMode | None) -> nn.Module:
    """Let a module itself normalise as ``functionalize`` makes it, for references that take no ``batch_norm``."""
    for layer in module.modules():
        if isinstance(layer, RUNNING_STATISTICS) and batch_norm == "frozen":
            layer.eval()
        elif isinstance(layer, RUNNING_STATISTICS) and batch_norm == "task":
            layer.running_mean = layer.running_var = None
    return module


@dataclass(frozen=True)
class NumericSetting:
    """Dtype and device of the computation; ``seed`` determines parameters, images and dropout."""

    dtype: torch.dtype
    device: torch.device
    seed: int


@dataclass(frozen=True)
class Case:
    """A model at one order and one number of inner steps: a row of the table."""

    model: ModelCase
    second_order: bool
    steps: int

    @property
    def name(self) -> str:
        """Full name of the case."""
        return f"{self.model.name}, {'second' if self.second_order else 'first'} order, K={self.steps}"

    def inner(self, engine: str) -> InnerLoop:
        """Return the inner loop for testing an engine."""
        chunk, every = self.model.task_chunk, self.model.checkpoint_every
        return replace(self.reference_inner, engine=engine, task_chunk=chunk, checkpoint_every=every)

    @property
    def reference_inner(self) -> InnerLoop:
        """The inner loop of the reference: ``unroll``, all tasks at once."""
        return InnerLoop(_LR, self.steps, self.second_order, "unroll", rule=self.model.rule)


@dataclass(frozen=True, eq=False)
class VerificationProblem:
    """A case with its model, as other libraries take it, and tasks."""

    case: Case
    setting: NumericSetting
    module: nn.Module
    episodes: Episodes
    forward: Forward
    theta: Params

    @classmethod
    def create(cls, case: Case, setting: NumericSetting) -> VerificationProblem:
        """Draw random parameters and images, with labels in class order."""
        seed_all(setting.seed)
        module = case.model.module().to(device=setting.device, dtype=setting.dtype)
        images = torch.rand(2, _TASKS, _WAYS * _EXAMPLES, *case.model.example_shape)
        images = images.to(device=setting.device, dtype=setting.dtype)
        labels = torch.arange(_WAYS, device=setting.device).repeat_interleave(_EXAMPLES).repeat(_TASKS, 1)
        episodes = Episodes(images[0], labels, images[1], labels)
        peer_module = _with_statistics(copy.deepcopy(module), case.model.batch_norm)
        return cls(case, setting, peer_module, episodes, *functionalize(module, batch_norm=case.model.batch_norm))

    def grads(self, inner: InnerLoop) -> Params:
        """Return the meta-gradient; dropout draws the same masks for every inner loop."""
        seed_all(self.setting.seed)
        grads = meta_gradient(self.forward, self.theta, self.episodes, inner).grads
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize(self.setting.device)
        return grads

    def adapted(self, theta: Params) -> Params:
        """Return the fast weights at theta, and leave the random state as an engine has it at the query pass."""
        seed_all(self.setting.seed)
        return adapt(self.forward, theta, self.episodes.support_x, self.episodes.support_y, self.case.reference_inner)

    def query_loss(self, fast: Params) -> Tensor:
        """Return the mean query loss over tasks, computed one task at a time, unlike in the engines.

        Stochastic models are batched as in the engines, so that they draw the same random numbers.
        """
        x, y = self.episodes.query_x, self.episodes.query_y
        if self.case.model.is_stochastic:
            predictions = predict(self.forward, fast, x)
        else:
            by_task = ({name: w[t] for name, w in fast.items()} for t in range(_TASKS))
            predictions = torch.stack([self.forward(params, x[t]) for t, params in enumerate(by_task)])
        return cross_entropy(predictions.flatten(0, 1), y.flatten())
