"""From a checked configuration to the parts of a run: data, model, inner loops."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from metalearn.algorithms import ALGORITHMS, Algorithm
from metalearn.config.schema import (
    Conv4Config,
    InnerConfig,
    MLPConfig,
    ResNet12Config,
    SinusoidConfig,
    TrainConfig,
)
from metalearn.core.errors import ConfigError
from metalearn.core.functional import functionalize
from metalearn.core.module_parts import module_parts
from metalearn.core.types import Episodes, Forward, MetaGradient, Params
from metalearn.data.sampler import TaskSampler
from metalearn.inner import SGD, Adam, InnerLoop, Momentum, UpdateRule
from metalearn.metagrad.baselines.backend import BaselineGradient, backend
from metalearn.models import MLP, ContextConv4, ContextMLP, Conv4, ResNet12
from metalearn.training.evaluation import collect_norm_statistics
from metalearn.training.random_state import seed_all
from metalearn.training.runtime import torchrun
from metalearn.training.runtime.cuda_graph import with_cuda_graph
from metalearn.training.runtime.precision import check_tf32_available, precision_context
from metalearn.training.scores import ACCURACY, MSE, Metric
from metalearn.training.tasks import build_samplers


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that a run computes with, on its device; nothing here changes while it runs, but for caches.

    Args:
        config: what it was built from.
        dataset: name of the data set.
        device: where everything lies.
        module: the network, of which ``forward`` is made.
        forward: the model as a pure function.
        theta: its initial meta-parameters, with what the algorithm learns beside the model's.
        algorithm: what is meta-learned.
        score: what tasks are judged by.
        train: sampler of training tasks.
        validation: sampler of the tasks that choose the checkpoint.
        test: sampler of the tasks of the final test.
    """

    config: TrainConfig
    dataset: str
    device: torch.device
    module: nn.Module
    forward: Forward
    theta: Params
    algorithm: Algorithm
    score: Metric
    train: TaskSampler
    validation: TaskSampler
    test: TaskSampler

    @property
    def inner(self) -> InnerLoop:
        """The inner loop in training, without annealing."""
        return self.algorithm.inner

    @property
    def eval_inner(self) -> InnerLoop:
        """The inner loop in validation and test; never differentiated."""
        return self.algorithm.testing(self.config.inner.eval_steps)

    @property
    def eval_batch(self) -> int:
        """Tasks at a time in validation and test."""
        return min(self.config.task.meta_batch, self.inner.task_chunk or self.config.task.meta_batch)

    def precision(self) -> AbstractContextManager[None]:
        """A context in which the model computes with ``run.precision``."""
        return precision_context(self.config.run.precision, self.device)

    def gradient(self, params: Params, episodes: Episodes, iteration: int) -> MetaGradient:
        """The meta-gradient of training at given parameters, of given tasks, after that many meta-steps.

        With ``run.cuda_graph`` by a graph, which is recorded when it is first used and is no state of the run; what it
        returns is valid until it is next used. With ``algorithm.backend`` by another library.
        """
        if self.config.run.cuda_graph:
            return self._graphed(params, episodes)
        if self._backend:
            return self._backend(params, episodes, self.inner)
        return self.eager(params, episodes, iteration)

    def eager(self, params: Params, episodes: Episodes, iteration: int) -> MetaGradient:
        """As ``gradient``, by this library and without a graph."""
        progress = iteration / self.config.outer.iterations
        return self.algorithm.meta_gradient(self.forward, params, episodes, loss=self.score.loss, progress=progress)

    @cached_property
    def _graphed(self) -> Callable[[Params, Episodes], MetaGradient]:
        return with_cuda_graph(lambda params, episodes: self.eager(params, episodes, 0), self.device)

    def refuse_unfit_backend(self) -> None:
        """Refuse another library that is to compute the meta-gradient and is not installed, or does not offer it.

        Raises:
            ConfigError: naming it, and how to install it, or what it lacks.
        """
        if self._backend:
            self._backend.refuse(self.inner)

    @cached_property
    def _backend(self) -> BaselineGradient | None:
        name = self.config.algorithm.backend
        return None if name == "metalearn" else backend(name, self.module, loss=self.score.loss)

    def statistics(self, params: Params, iteration: int) -> Params:
        """BatchNorm's statistics after every inner step, as entries of theta, on the last batches before that
        meta-step; none if the algorithm keeps none. The same in every process.
        """
        if not self.algorithm.tracks_norm_statistics:
            return {}
        tasks = self.config.task.meta_batch
        first = max(iteration - _BATCHES_OF_STATISTICS, 0)
        inner, totals = self.algorithm.testing(self.inner.steps), Params()
        chunks = [c for n in range(first, max(iteration, 1)) for c in self.train.batch(n, tasks).split(self.eval_batch)]
        for chunk in chunks:
            share = chunk.tasks / sum(c.tasks for c in chunks)
            found = collect_norm_statistics(self.forward, params, chunk, inner, loss=self.score.loss)
            totals = {name: totals.get(name, 0) + share * value for name, value in found.items()}
        return totals


_BATCHES_OF_STATISTICS = 4


def build_experiment(config: TrainConfig) -> Experiment:
    """Load the data, build the model, seeded by ``run.seed``.

    Raises:
        ConfigError: if the device is not there, or the algorithm does not fit the model.
        DataError: if the data set is missing or damaged.
    """
    device = resolve_device(config.run.device)
    if config.run.deterministic:
        _make_deterministic()
    train, validation, test = build_samplers(config, device)
    seed_all(config.run.seed)
    module = build_model(config, train.example_shape).to(device)
    forward, params = functionalize(module)
    algorithm = build_algorithm(config, module)
    experiment = Experiment(
        *(config, config.data.name, device, module, forward, algorithm.init(params), algorithm, build_metric(config)),
        *(train, validation, test),
    )
    experiment.refuse_unfit_backend()
    statistics = experiment.statistics(experiment.theta, 0)
    return dataclasses.replace(experiment, theta={**experiment.theta, **statistics})


def with_inner_config(experiment: Experiment, settings: InnerConfig) -> Experiment:
    """The experiment with another engine, task chunk or number of snapshots, also in its configuration."""
    config = dataclasses.replace(experiment.config, inner=settings)
    return dataclasses.replace(experiment, config=config, algorithm=build_algorithm(config, experiment.module))


def build_algorithm(config: TrainConfig, module: nn.Module) -> Algorithm:
    """The algorithm of a configuration, for a network.

    Raises:
        ConfigError: if it does not fit the network.
    """
    options = {f.name: getattr(config.algorithm, f.name) for f in dataclasses.fields(config.algorithm)}
    name = options.pop("name")
    del options["backend"]
    try:
        return ALGORITHMS[name](build_inner_loop(config.inner), module_parts(module), **options)
    except ValueError as error:
        raise ConfigError(f"algorithm={name}, model={config.model.name}: {error}") from error


def build_metric(config: TrainConfig) -> Metric:
    """What a configuration's tasks are judged by."""
    return MSE if isinstance(config.data, SinusoidConfig) else ACCURACY


def build_inner_loop(settings: InnerConfig) -> InnerLoop:
    """The inner loop in training, as every algorithm starts from."""
    rules: dict[str, Callable[[], UpdateRule]] = {
        "sgd": SGD,
        "momentum": lambda: Momentum(settings.momentum),
        "nesterov": lambda: Momentum(settings.momentum, nesterov=True),
        "adam": lambda: Adam((settings.betas[0], settings.betas[1]), settings.eps),
    }
    return InnerLoop(
        lr=settings.lr,
        steps=settings.steps,
        second_order=settings.second_order,
        engine=settings.engine,
        task_chunk=settings.task_chunk,
        snapshot_every=settings.checkpoint_every,
        rule=rules[settings.optimizer](),
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )


def build_model(config: TrainConfig, example_shape: torch.Size) -> nn.Module:
    """A freshly initialised network for inputs ``[channels, height, width]``, or ``[1]`` of sinusoids."""
    model, outputs = config.model, 1 if isinstance(config.data, SinusoidConfig) else config.task.ways
    if isinstance(model, Conv4Config):
        channels, width, pool = example_shape[0], model.width, model.pool
        if model.context:
            return ContextConv4(outputs, channels=channels, width=width, pool=pool, context=model.context)
        return Conv4(outputs, channels=channels, width=width, pool=pool)
    if isinstance(model, ResNet12Config):
        return ResNet12(outputs, channels=example_shape[0], widths=model.widths)
    assert isinstance(model, MLPConfig)
    if model.context:
        return ContextMLP(example_shape.numel(), outputs, hidden=model.hidden, context=model.context)
    return MLP(example_shape.numel(), outputs, hidden=model.hidden, batch_norm=model.batch_norm)


def training_device(config: TrainConfig) -> torch.device:
    """Where a configuration is trained; found before anything is loaded.

    Raises:
        ConfigError: if that device is not there, or cannot compute with ``run.precision``.
    """
    device = resolve_device(config.run.device)
    check_tf32_available(config.run.precision, device)
    return device


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU where there is none; under ``torchrun`` every process has its own GPU.

    Raises:
        ConfigError: if that device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and torchrun.world_size() > 1:
        if name != "cuda":
            raise ConfigError(f"run.device={name}: torchrun gives every process a GPU of its own; use run.device=cuda")
        name = f"cuda:{torchrun.local_rank()}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device={name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use run.device=auto or "
            "cpu, and under torchrun no more processes than GPUs"
        )
    return device


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
