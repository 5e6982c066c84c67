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

from metalearn.data.catalog import glyph_splits
from metalearn.data.glyphs import glyphs
from metalearn.data.omniglot import omniglot
from metalearn.data.sampler import EpisodeSampler, TaskShape
from metalearn.data.splits import ImageSplits
from metalearn.errors import ConfigError
from metalearn.inner import InnerLoop
from metalearn.metagrad import meta_gradient
from metalearn.models import MLP, Conv4
from metalearn.params import functionalize
from metalearn.runs import torchrun
from metalearn.runs.cuda_graph import graphed
from metalearn.runs.precision import computed_in, refuse_missing_tf32
from metalearn.runs.random_state import seed_all
from metalearn.runs.schema import Conv4Config, GlyphsConfig, InnerConfig, MLPConfig, OmniglotConfig, TrainConfig
from metalearn.types import Episodes, Forward, MetaGradient, Params


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that a run computes with, on its device; nothing here changes while it runs, but for a cache.

    Args:
        config: what it was built from.
        dataset: name of the data set.
        device: where everything lies.
        forward: the model as a pure function.
        theta: its initial parameters.
        inner: the inner loop in training.
        eval_inner: the inner loop in validation and test; never differentiated.
        train: sampler of training tasks.
        validation: sampler of the tasks that choose the checkpoint.
        test: sampler of the tasks of the final test.
    """

    config: TrainConfig
    dataset: str
    device: torch.device
    forward: Forward
    theta: Params
    inner: InnerLoop
    eval_inner: InnerLoop
    train: EpisodeSampler
    validation: EpisodeSampler
    test: EpisodeSampler

    @property
    def eval_batch(self) -> int:
        """Tasks at a time in validation and test."""
        return min(self.config.task.meta_batch, self.inner.task_chunk or self.config.task.meta_batch)

    def precision(self) -> AbstractContextManager[None]:
        """A context in which the model computes with ``run.precision``."""
        return computed_in(self.config.run.precision, self.device)

    @cached_property
    def gradient(self) -> Callable[[Params, Episodes], MetaGradient]:
        """The meta-gradient of training at given parameters, of given tasks; with ``run.cuda_graph`` by its graph.

        A graph is recorded when it is first used, belongs to this object and is no state of the run. What it returns
        is valid until it is next used.
        """

        def eager(params: Params, episodes: Episodes) -> MetaGradient:
            return meta_gradient(self.forward, params, episodes, self.inner)

        return graphed(eager, self.device) if self.config.run.cuda_graph else eager


def build(config: TrainConfig) -> Experiment:
    """Load the data, build the model, seeded by ``run.seed``.

    Raises:
        ConfigError: if the device is not there.
        DataError: if the data set is missing or damaged.
    """
    device = pick_device(config.run.device)
    if config.run.deterministic:
        _make_deterministic()
    splits = load_data(config).to(device)
    task, seed = config.task, config.run.seed
    train_shape = TaskShape(task.ways, task.shots, task.queries)
    eval_shape = TaskShape(task.ways, task.shots, config.eval.queries)
    train = EpisodeSampler(splits.train, train_shape, seed, "train")
    validation = EpisodeSampler(splits.validation, eval_shape, seed, "validation")
    test = EpisodeSampler(splits.test, eval_shape, seed, "test")
    seed_all(config.run.seed)
    forward, theta = functionalize(build_model(config, splits.train.shape[2:]).to(device))
    inner, eval_inner = inner_loops(config.inner)
    return Experiment(config, splits.name, device, forward, theta, inner, eval_inner, train, validation, test)


def with_settled(experiment: Experiment, settings: InnerConfig) -> Experiment:
    """The experiment with another engine, task chunk or number of snapshots, also in its configuration."""
    inner, eval_inner = inner_loops(settings)
    config = dataclasses.replace(experiment.config, inner=settings)
    return dataclasses.replace(experiment, config=config, inner=inner, eval_inner=eval_inner)


def inner_loops(settings: InnerConfig) -> tuple[InnerLoop, InnerLoop]:
    """The inner loop in training, and that in validation and test."""
    training = InnerLoop(
        lr=settings.lr,
        steps=settings.steps,
        second_order=settings.second_order,
        engine=settings.engine,
        task_chunk=settings.task_chunk,
        snapshot_every=settings.snapshot_every,
    )
    return training, dataclasses.replace(training, steps=settings.eval_steps, second_order=False)


def load_data(config: TrainConfig) -> ImageSplits:
    """The data set of a configuration, in main memory."""
    data = config.data
    if isinstance(data, OmniglotConfig):
        return omniglot(data.root, split=data.split, rotations=data.rotations)
    assert isinstance(data, GlyphsConfig)
    images = glyphs(classes=data.classes, jitter=data.jitter, seed=data.seed)
    sizes = glyph_splits(data.classes)
    return ImageSplits(data.name, *images.split([sizes.train, sizes.validation, sizes.test]))


def build_model(config: TrainConfig, image: torch.Size) -> nn.Module:
    """A freshly initialised network for images ``[channels, height, width]``."""
    model, ways = config.model, config.task.ways
    if isinstance(model, Conv4Config):
        return Conv4(ways, channels=image[0], width=model.width, pool=model.pool)
    assert isinstance(model, MLPConfig)
    return MLP(image.numel(), ways, hidden=model.hidden, batch_norm=model.batch_norm)


def training_device(config: TrainConfig) -> torch.device:
    """Where a configuration is trained; found before anything is loaded.

    Raises:
        ConfigError: if that device is not there, or cannot compute with ``run.precision``.
    """
    device = pick_device(config.run.device)
    refuse_missing_tf32(config.run.precision, device)
    return device


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU where there is none; under ``torchrun`` every process has its own GPU.

    Raises:
        ConfigError: if that device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and torchrun.size() > 1:
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
