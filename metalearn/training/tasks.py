"""From a configuration to its streams of tasks: for training, validation and test."""

from __future__ import annotations

import torch

from metalearn.config.schema import GlyphsConfig, ImagesConfig, OmniglotConfig, SinusoidConfig, TrainConfig
from metalearn.core.errors import ConfigError
from metalearn.data.glyphs import make_glyphs
from metalearn.data.image_decoding import load_image_splits
from metalearn.data.metadata import glyph_split_sizes
from metalearn.data.omniglot import load_omniglot
from metalearn.data.sampler import TaskSampler, TaskShape
from metalearn.data.sinusoid import SinusoidSampler
from metalearn.data.splits import ImageSplits


def build_samplers(config: TrainConfig, device: torch.device) -> tuple[TaskSampler, TaskSampler, TaskSampler]:
    """The tasks of training, validation and test, on a device; seeded by ``run.seed``.

    Raises:
        DataError: if the data set is missing or damaged.
    """
    task, seed, eval_queries = config.task, config.run.seed, config.eval.queries
    if isinstance(config.data, SinusoidConfig):
        return (
            SinusoidSampler(task.shots, task.queries, seed, "train", device),
            SinusoidSampler(task.shots, eval_queries, seed, "validation", device),
            SinusoidSampler(task.shots, eval_queries, seed, "test", device),
        )
    splits = load_data(config).to(device)
    train_shape = TaskShape(task.ways, task.shots, task.queries)
    eval_shape = TaskShape(task.ways, task.shots, eval_queries)
    return (
        splits.sampler("train", train_shape, seed),
        splits.sampler("validation", eval_shape, seed),
        splits.sampler("test", eval_shape, seed),
    )


def load_data(config: TrainConfig) -> ImageSplits:
    """The data set of a configuration, in main memory.

    Raises:
        ConfigError: if it is not made of images.
        DataError: if it is missing or damaged.
    """
    data = config.data
    if isinstance(data, OmniglotConfig):
        return load_omniglot(data.root, split=data.split, rotations=data.rotations)
    if isinstance(data, ImagesConfig):
        return load_image_splits(
            data.root,
            size=data.size,
            channels=data.channels,
            fractions=data.fractions,
            seed=data.seed,
            unreadable=data.on_unreadable,
            ways=config.task.ways,
            needed=config.images_per_class(),
        )
    if not isinstance(data, GlyphsConfig):
        raise ConfigError(f"data={data.name}: it has no images; take data=omniglot, glyphs or images")
    images = make_glyphs(classes=data.classes, jitter=data.jitter, seed=data.seed)
    sizes = glyph_split_sizes(data.classes)
    return ImageSplits(data.name, *images.split([sizes.train, sizes.validation, sizes.test]))
