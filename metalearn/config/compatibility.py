"""Checks over several keys of a training. None needs torch, or data that is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from metalearn.config.options import (
    Conv4Config,
    CustomAlgorithmConfig,
    CustomModelConfig,
    GlyphsConfig,
    ImagesConfig,
    MAMLPPConfig,
    MLPConfig,
    OmniglotConfig,
    ResNet12Config,
    SinusoidConfig,
    TorchvisionConfig,
)
from metalearn.config.schema import TrainConfig
from metalearn.core.errors import DataError
from metalearn.core.text import plural
from metalearn.data.class_split import check_split_sizes, read_class_split
from metalearn.data.image_folder import class_sizes, list_splits
from metalearn.data.metadata import DRAWINGS_PER_CLASS, GLYPH_SPLIT_FRACTIONS, OMNIGLOT_SPLITS, glyph_split_sizes

_TF32 = (
    "run.precision=tf32: TF32 is how NVIDIA GPUs since Ampere multiply, and run.device is {}; take "
    "run.precision=float32 (or bfloat16), or such a GPU"
)
NO_RULE = "inner.optimizer=custom: inner.optimizer_target=MODULE:NAME is required, what makes the update rule"
_CONFLICTS: tuple[tuple[Callable[[TrainConfig], object], str], ...] = (
    (
        lambda c: c.inner.engine == "auto" and c.run.deterministic,
        "inner.engine=auto with run.deterministic=true: auto chooses by measured times, which differ from run to run; "
        "name an engine",
    ),
    (
        lambda c: c.run.memory_limit_mib is not None and c.inner.engine != "auto",
        "run.memory_limit_mib={c.run.memory_limit_mib:g}: only inner.engine=auto heeds it; set that, or leave it out",
    ),
    (
        lambda c: c.inner.checkpoint_every > 1 and c.inner.engine == "unroll",
        "inner.checkpoint_every={c.inner.checkpoint_every}: inner.engine=unroll keeps graphs and no checkpoints; take "
        "checkpoint, adjoint or auto, or leave it",
    ),
    (
        lambda c: isinstance(c.data, SinusoidConfig) and not isinstance(c.model, (MLPConfig, CustomModelConfig)),
        "model={c.model.name}: data=sinusoid has numbers for inputs, and no images; take model=mlp",
    ),
    (
        lambda c: c.inner.optimizer != "sgd" and c.inner.steps == c.inner.eval_steps == 0,
        "inner.optimizer={c.inner.optimizer} with inner.steps=0 and inner.eval_steps=0: no step is taken by it",
    ),
    (
        lambda c: c.algorithm.name == "cavia" and not isinstance(c.model, CustomModelConfig) and not _context(c),
        "algorithm=cavia with model={c.model.name}: it adapts context parameters, of which the model has none; take "
        "model=conv4 or mlp with model.context=100",
    ),
    (
        lambda c: not isinstance(c.algorithm, CustomAlgorithmConfig) and c.algorithm.name != "cavia" and _context(c),
        "model.context={c.model.context}: only algorithm=cavia adapts context parameters; leave it at 0",
    ),
    (
        lambda c: c.algorithm.name == "protonet" and c.data.is_regression,
        "algorithm=protonet with data={c.data.name}: prototypes are of classes, and numbers have none",
    ),
    (
        lambda c: c.inner.optimizer == "custom" and c.inner.optimizer_target is None,
        NO_RULE,
    ),
    (
        lambda c: (c.inner.optimizer_target is not None or c.inner.optimizer_options) and c.inner.optimizer != "custom",
        "inner.optimizer={c.inner.optimizer}: inner.optimizer_target and inner.optimizer_options need "
        "inner.optimizer=custom; set that, or leave them out",
    ),
    (
        lambda c: c.algorithm.name in ("reptile", "imaml") and c.inner.steps == 0,
        "inner.steps=0 with algorithm={c.algorithm.name}: it learns from where the steps lead; take 1 or more",
    ),
    (
        lambda c: (
            c.run.cuda_graph is True
            and isinstance(c.algorithm, MAMLPPConfig)
            and (c.algorithm.multi_step_share > 0 or c.algorithm.first_order_share > 0)
        ),
        "run.cuda_graph=true with algorithm=maml_pp: a graph repeats one computation, and this one changes as the "
        "training goes on (algorithm.multi_step_share=0 algorithm.first_order_share=0 keep it)",
    ),
)
"""Combinations of keys that cannot be used, and why; ``c`` is the configuration."""
_ALGORITHMS_OF_BACKENDS = {"learn2learn": ("maml", "anil", "meta_sgd"), "higher": ("maml",), "torchopt": ("maml",)}
_NO_ENGINE: dict[str, object] = {"inner.engine": "unroll", "inner.checkpoint_every": 1}
_NOT_IN_BACKENDS: dict[str, object] = {
    "inner.clip_norm": None,
    "run.precision": "float32",
    "inner.engine": "unroll",
    "inner.task_chunk": None,
}
_NOT_IN_LEARN2LEARN: dict[str, object] = {"inner.optimizer": "sgd", "inner.weight_decay": 0}


def find_conflicts(config: TrainConfig, *, trains: bool = True) -> list[str]:
    """Return a message for every combination of keys that cannot be trained with.

    Args:
        config: a training's.
        trains: as in ``validate_train_config``.
    """
    messages = [message.format(c=config) for is_wrong, message in _CONFLICTS if is_wrong(config)]
    if trains and config.inner.second_order and (name := config.algorithm.name) in ("reptile", "protonet"):
        messages.append(f"inner.second_order=true with algorithm={name}: it has no second order; set it to false")
    if trains and config.run.device == "cpu" and config.run.precision == "tf32":
        messages.append(_TF32.format("a CPU"))
    for check in (_batch_norm, _ways, _drawings, _image_size, _classes_of_images, _engine, _backend):
        messages += check(config)
    return messages


def tf32_error(precision: str, device: str) -> str | None:
    """Return why this precision needs another device than one without TF32; ``None`` if it does not."""
    return _TF32.format(device) if precision == "tf32" else None


def _context(config: TrainConfig) -> int:
    return config.model.context if isinstance(config.model, (Conv4Config, MLPConfig)) else 0


def _batch_norm(config: TrainConfig) -> Iterator[str]:
    model, algorithm = config.model, config.algorithm
    if isinstance(algorithm, MAMLPPConfig) and isinstance(model, MLPConfig) and (not model.batch_norm or model.context):
        for key in ("per_step_affine", "per_step_statistics"):
            if getattr(algorithm, key):
                yield f"algorithm.{key}=true with model.batch_norm=false: the model has no BatchNorm; set it to false"


def _ways(config: TrainConfig) -> Iterator[str]:
    """Check the smallest split; one of images is listed below, and of a user's own data it is not known yet."""
    data, smallest, where = config.data, sys.maxsize, ""
    if isinstance(data, OmniglotConfig):
        smallest = OMNIGLOT_SPLITS[data.split].smallest * (4 if data.rotate_test else 1)
        where = f"Omniglot's {data.split} split"
    elif isinstance(data, GlyphsConfig):
        smallest = glyph_split_sizes(data.classes).smallest
        where = f"{data.classes} glyphs ({GLYPH_SPLIT_FRACTIONS[1]:.0%} validate)"
    if config.task.ways > smallest:
        yield f"task.ways={config.task.ways}: at most {smallest}, the smallest part of {where}"


def _drawings(config: TrainConfig) -> Iterator[str]:
    if not isinstance(config.data, (OmniglotConfig, GlyphsConfig)):
        return
    task, queries = config.task, max(config.task.queries, config.eval.queries)
    if (each := task.shots + queries) > DRAWINGS_PER_CLASS:
        name = "task.queries" if queries == task.queries else "eval.queries"
        yield (
            f"task.shots={task.shots} and {name}={queries}: together {each}, and a class has {DRAWINGS_PER_CLASS} "
            f"drawings; choose at most {DRAWINGS_PER_CLASS} in all (unless it is set, eval.queries is task.shots)"
        )


def _image_size(config: TrainConfig) -> Iterator[str]:
    """Check the size of images after pooling."""
    model, least = config.model, 1
    if isinstance(model, ResNet12Config):
        least = 2 ** len(model.widths)
    elif isinstance(model, Conv4Config) and model.pool == "max":
        least = 16
    if isinstance(config.data, (ImagesConfig, TorchvisionConfig)) and config.data.size < least:
        yield (
            f"data.size={config.data.size}: model={model.name} halves images {least.bit_length() - 1} times and needs "
            f"at least {least} pixels a side"
        )


def _classes_of_images(config: TrainConfig) -> Iterator[str]:
    """List a folder of images; none is read. Of a set of torchvision's, count the classes of its class split."""
    data = config.data
    try:
        if isinstance(data, ImagesConfig):
            splits = list_splits(data.root, fractions=data.fractions, seed=data.seed, class_split=data.class_split)
            source, needed = f"data.root={data.root}", config.images_per_class()
            check_split_sizes(class_sizes(splits), source, ways=config.task.ways, needed=needed)
        elif isinstance(data, TorchvisionConfig) and data.class_split is not None:
            for split, names in read_class_split(data.class_split).items():
                if len(names) < config.task.ways:
                    yield (
                        f"data.class_split: {split} has {plural(len(names), 'class', 'classes')}, and a task takes "
                        f"task.ways={config.task.ways}"
                    )
    except DataError as error:
        yield str(error)


def _engine(config: TrainConfig) -> Iterator[str]:
    if (name := config.algorithm.name) in ("reptile", "imaml"):
        yield from _only(config, f"algorithm={name}: it has a gradient of its own", _NO_ENGINE)


def _backend(config: TrainConfig) -> Iterator[str]:
    name, backend = config.algorithm.name, config.algorithm.backend
    if backend == "metalearn":
        return
    if name not in _ALGORITHMS_OF_BACKENDS[backend]:
        yield (
            f"algorithm.backend={backend} with algorithm={name}: {backend} is trained with for comparison, on "
            f"{', '.join(_ALGORITHMS_OF_BACKENDS[backend])}; take algorithm.backend=metalearn"
        )
    settings = _NOT_IN_BACKENDS | (_NOT_IN_LEARN2LEARN if backend == "learn2learn" else {})
    if config.run.cuda_graph is True:
        settings |= {"run.cuda_graph": "auto"}
    yield from _only(config, f"algorithm.backend={backend}: {backend} has no such thing", settings)


def _only(config: TrainConfig, reason: str, settings: dict[str, object]) -> Iterator[str]:
    """Check that every one of these keys has the only value that it may have."""
    for key, only in settings.items():
        section, _, name = key.partition(".")
        if (value := getattr(getattr(config, section), name)) != only:
            yield f"{key}={value} with {reason}; leave it at {'null' if only is None else str(only).lower()}"
