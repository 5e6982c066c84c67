"""Build the parts of a run from its configuration: data, model, algorithm, metric."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from metalearn.algorithms import ALGORITHMS, Algorithm
from metalearn.config.options import (
    Conv4Config,
    CustomAlgorithmConfig,
    CustomDataConfig,
    CustomModelConfig,
    GlyphsConfig,
    ImagesConfig,
    MLPConfig,
    OmniglotConfig,
    ResNet12Config,
    SinusoidConfig,
    TorchvisionConfig,
)
from metalearn.config.schema import InnerConfig, TrainConfig
from metalearn.config.target import import_targets
from metalearn.core.errors import ConfigError
from metalearn.core.functional import functionalize
from metalearn.core.module_parts import module_parts
from metalearn.core.profiling.hardware import avoid_triton_without_compiler
from metalearn.core.types import Episodes, Forward, MetaGradient, Params
from metalearn.data.glyphs import make_glyphs
from metalearn.data.image_decoding import load_image_splits
from metalearn.data.metadata import glyph_split_sizes
from metalearn.data.omniglot import load_omniglot
from metalearn.data.sampler import TaskSampler, TaskShape
from metalearn.data.sinusoid import SinusoidSampler
from metalearn.data.splits import ImageSplits
from metalearn.inner import SGD, Adam, InnerLoop, Momentum, UpdateRule
from metalearn.metagrad.baselines.backend import BaselineGradient, backend
from metalearn.models import MLP, ContextConv4, ContextMLP, Conv4, ResNet12
from metalearn.models.kernels import kernels_on_gpus
from metalearn.training.custom import (
    build_custom_algorithm,
    build_custom_model,
    build_custom_rule,
    build_custom_samplers,
    check_output_shape,
)
from metalearn.training.evaluation import ACCURACY, MSE, Metric, collect_norm_statistics
from metalearn.training.runtime import torchrun
from metalearn.training.runtime.cuda_graph import with_cuda_graph
from metalearn.training.runtime.precision import check_tf32_available, precision_context
from metalearn.training.state import seed_all

_NUM_STATISTICS_BATCHES = 4


@dataclass(frozen=True, eq=False)
class Experiment:
    """The immutable parts of a run; ``theta`` holds the parameters of ``module`` and those that the algorithm adds.

    ``kernels_on_gpus`` says whether meta-gradients on a GPU use the stacked kernels (``choose_kernels`` measures it).
    """

    config: TrainConfig
    dataset: str
    device: torch.device
    module: nn.Module
    forward: Forward
    theta: Params
    algorithm: Algorithm
    metric: Metric
    train: TaskSampler
    validation: TaskSampler
    test: TaskSampler
    kernels_on_gpus: bool = False

    @property
    def inner(self) -> InnerLoop:
        """Inner loop in training, without annealing."""
        return self.algorithm.inner

    @property
    def eval_inner(self) -> InnerLoop:
        """Inner loop in validation and test; it is never differentiated."""
        return self.algorithm.eval_inner(self.config.inner.eval_steps)

    @property
    def eval_batch(self) -> int:
        """Tasks at a time in validation and test."""
        return min(self.config.task.meta_batch, self.inner.task_chunk or self.config.task.meta_batch)

    def precision(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes with ``run.precision``."""
        return precision_context(self.config.run.precision, self.device)

    def meta_gradient(self, params: Params, episodes: Episodes, iteration: int) -> MetaGradient:
        """Return the meta-gradient of tasks after ``iteration`` meta-steps, as the configuration says how.

        If ``uses_cuda_graph`` it is the replay of a graph that is captured at its first use; the result is valid until
        the next call. With ``algorithm.backend`` another library computes it.
        """
        if self.uses_cuda_graph:
            return self._graph(params, episodes)
        if self._backend:
            return self._backend(params, episodes, self.inner)
        return self.meta_gradient_eager(params, episodes, iteration)

    def meta_gradient_eager(self, params: Params, episodes: Episodes, iteration: int) -> MetaGradient:
        """Return the meta-gradient by this library, without a CUDA graph."""
        progress = iteration / self.config.outer.iterations
        with kernels_on_gpus(self.kernels_on_gpus):
            return self.algorithm.meta_gradient(
                self.forward, params, episodes, loss=self.metric.loss, progress=progress
            )

    @property
    def uses_cuda_graph(self) -> bool:
        """True if ``run.cuda_graph`` asks for a graph; ``auto`` does on a GPU, where a graph can hold every meta-step.

        It cannot if the algorithm changes in the course of training; a user's own code may do so unseen.
        """
        setting = self.config.run.cuda_graph
        if setting != "auto":
            return setting
        own_code = self.config.targets().keys() - {"data.target"}
        return self.device.type == "cuda" and not (self.algorithm.is_annealed or self._backend or own_code)

    @cached_property
    def _graph(self) -> Callable[[Params, Episodes], MetaGradient]:
        of = replace(self)  # self would be in a cycle with its graph, whose memory then stays after its last use
        return with_cuda_graph(lambda params, episodes: of.meta_gradient_eager(params, episodes, 0), self.device)

    @cached_property
    def _backend(self) -> BaselineGradient | None:
        name = self.config.algorithm.backend
        return None if name == "metalearn" else backend(name, self.module, loss=self.metric.loss)

    def check_backend(self) -> None:
        """Raise ``ConfigError`` if the library of ``algorithm.backend`` is missing, or lacks the inner loop."""
        if self._backend:
            self._backend.check_supported(self.inner)

    def norm_statistics(self, params: Params, iteration: int) -> Params:
        """Return BatchNorm's statistics after every inner step, as entries of theta, from the last training batches.

        Empty if the algorithm tracks none. The same in every process.
        """
        if not self.algorithm.tracks_norm_statistics:
            return {}
        tasks = self.config.task.meta_batch
        first = max(iteration - _NUM_STATISTICS_BATCHES, 0)
        inner, totals = self.algorithm.eval_inner(self.inner.steps), Params()
        chunks = [c for n in range(first, max(iteration, 1)) for c in self.train.batch(n, tasks).split(self.eval_batch)]
        for chunk in chunks:
            weight = chunk.tasks / sum(c.tasks for c in chunks)
            found = collect_norm_statistics(self.forward, params, chunk, inner, loss=self.metric.loss)
            totals = {name: totals.get(name, 0) + weight * value for name, value in found.items()}
        return totals


def build_experiment(config: TrainConfig) -> Experiment:
    """Load the data and build the model, seeded by ``run.seed``.

    Raise ``ConfigError`` if the device or a user's code does not exist, or the algorithm does not fit the model;
    ``DataError`` if the data set is missing or damaged.
    """
    import_targets(config.targets())
    device = resolve_device(config.run.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.run.deterministic  # shapes never change
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
    train, validation, test = build_samplers(config, device)
    seed_all(config.run.seed)
    module = build_model(config, train.example_shape, num_outputs(config, train)).to(device)
    forward, params = functionalize_model(config, module)
    algorithm = build_algorithm(config, module)
    experiment = Experiment(
        *(config, config.data.label, device, module, forward, algorithm.init(params), algorithm, build_metric(config)),
        *(train, validation, test),
    )
    experiment.check_backend()
    return replace(experiment, theta={**experiment.theta, **experiment.norm_statistics(experiment.theta, 0)})


def with_config(experiment: Experiment, config: TrainConfig) -> Experiment:
    """Return the experiment with another inner loop, as ``inner.engine=auto`` resolves it."""
    return replace(experiment, config=config, algorithm=build_algorithm(config, experiment.module))


def build_samplers(config: TrainConfig, device: torch.device) -> tuple[TaskSampler, TaskSampler, TaskSampler]:
    """Return the samplers of training, validation and test tasks, seeded by ``run.seed``.

    Raises:
        DataError: if the data set is missing or damaged.
    """
    task, seed, eval_queries = config.task, config.run.seed, config.eval.queries
    if isinstance(config.data, CustomDataConfig):
        samplers = build_custom_samplers(config, device)
        return samplers["train"], samplers["validation"], samplers["test"]
    if isinstance(config.data, SinusoidConfig):
        return (
            SinusoidSampler(task.shots, task.queries, seed, "train", device),
            SinusoidSampler(task.shots, eval_queries, seed, "validation", device),
            SinusoidSampler(task.shots, eval_queries, seed, "test", device),
        )
    splits = load_data(config).to(device)
    eval_shape = TaskShape(task.ways, task.shots, eval_queries)
    return (
        splits.sampler("train", TaskShape(task.ways, task.shots, task.queries), seed),
        splits.sampler("validation", eval_shape, seed),
        splits.sampler("test", eval_shape, seed),
    )


def load_data(config: TrainConfig) -> ImageSplits:
    """Load an image data set; raise ``DataError`` if it is damaged or missing, ``ConfigError`` for other data."""
    data = config.data
    if isinstance(data, OmniglotConfig):
        return load_omniglot(data.root, split=data.split, rotations=data.rotations, rotate_test=data.rotate_test)
    if isinstance(data, (ImagesConfig, TorchvisionConfig)):
        load: Callable[..., ImageSplits] = load_image_splits
        if isinstance(data, TorchvisionConfig):  # torchvision's import is slow
            from metalearn.data.torchvision_sets import load_torchvision_splits as load
        settings = {name: value for name, value in vars(data).items() if name != "name"}
        return load(**settings, ways=config.task.ways, needed=config.images_per_class())
    if not isinstance(data, GlyphsConfig):
        raise ConfigError(
            f"data={data.name}: this needs images by class; take data=omniglot, glyphs, images or torchvision"
        )
    images = make_glyphs(classes=data.classes, jitter=data.jitter, seed=data.seed)
    sizes = glyph_split_sizes(data.classes)
    return ImageSplits(data.name, *images.split([sizes.train, sizes.validation, sizes.test]))


def build_algorithm(config: TrainConfig, module: nn.Module) -> Algorithm:
    """Return the configured algorithm for a network.

    Raises:
        ConfigError: if it does not fit the network.
    """
    algorithm, inner, parts = config.algorithm, build_inner_loop(config.inner), module_parts(module)
    if isinstance(algorithm, CustomAlgorithmConfig):
        return build_custom_algorithm(algorithm, inner, parts)
    options = {name: value for name, value in vars(algorithm).items() if name not in ("name", "backend")}
    try:
        return ALGORITHMS[algorithm.name](inner, parts, **options)
    except ValueError as error:
        raise ConfigError(f"algorithm={algorithm.name}, model={config.model.label}: {error}") from error


def build_metric(config: TrainConfig) -> Metric:
    """Return mean squared error for a regression, accuracy for classes."""
    return MSE if config.data.is_regression else ACCURACY


def build_inner_loop(settings: InnerConfig) -> InnerLoop:
    """Return the inner loop in training that every algorithm starts from."""
    rules: dict[str, Callable[[], UpdateRule]] = {
        "sgd": SGD,
        "momentum": lambda: Momentum(settings.momentum),
        "nesterov": lambda: Momentum(settings.momentum, nesterov=True),
        "adam": lambda: Adam((settings.betas[0], settings.betas[1]), settings.eps),
        "custom": lambda: build_custom_rule(settings.optimizer_target, settings.optimizer_options),
    }
    return InnerLoop(
        lr=settings.lr,
        steps=settings.steps,
        second_order=settings.second_order,
        engine=settings.engine,
        task_chunk=settings.task_chunk,
        checkpoint_every=settings.checkpoint_every,
        rule=rules[settings.optimizer](),
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )


def num_outputs(config: TrainConfig, sampler: TaskSampler) -> int:
    """Return the size of the model's output: the number of ways, or of a regression's targets."""
    return sampler.tasks(0, 1).query_y.shape[-1] if config.data.is_regression else config.task.ways


def build_model(config: TrainConfig, example_shape: torch.Size, outputs: int) -> nn.Module:
    """Return a newly initialised network.

    Args:
        config: names the model.
        example_shape: of one input, ``[channels, height, width]`` or ``[features]``.
        outputs: size of the output.

    Raises:
        ConfigError: if a user's model cannot be made, or a model does not fit a user's data.
    """
    module = _build_module(config, example_shape, outputs)
    if isinstance(config.model, CustomModelConfig):
        label, batch_norm = f"model.target={config.model.target}", config.model.batch_norm
        check_output_shape(module, label, example_shape, outputs, batch_norm)
    elif isinstance(config.data, CustomDataConfig):
        check_output_shape(module, f"model={config.model.name}", example_shape, outputs)
    return module


def functionalize_model(config: TrainConfig, module: nn.Module) -> tuple[Forward, Params]:
    """Return what ``build_model`` has made as a pure function, and its parameters."""
    return functionalize(
        module, batch_norm=config.model.batch_norm if isinstance(config.model, CustomModelConfig) else None
    )


def _build_module(config: TrainConfig, example_shape: torch.Size, outputs: int) -> nn.Module:
    model = config.model
    if isinstance(model, CustomModelConfig):
        return build_custom_model(model.target, model.options, example_shape, outputs)
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
    """Return the device; raise ``ConfigError`` if it does not exist, or cannot compute with ``run.precision``."""
    device = resolve_device(config.run.device)
    check_tf32_available(config.run.precision, device)
    return device


def resolve_device(name: str) -> torch.device:
    """Return the device: for ``auto`` the first GPU or else the CPU; under ``torchrun`` this process's own GPU."""
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
    if device.type == "cuda":
        avoid_triton_without_compiler()
    return device
