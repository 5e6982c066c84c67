"""Checks over several keys of a training. Each rule yields messages; none needs data or torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from metalearn.config.schema import (
    Conv4Config,
    ImagesConfig,
    MAMLPPConfig,
    MLPConfig,
    ResNet12Config,
    SinusoidConfig,
    TrainConfig,
)
from metalearn.core.errors import DataError
from metalearn.data.image_folder import check_split_sizes, list_splits
from metalearn.data.metadata import DRAWINGS_PER_CLASS

_BY_BACKENDS = {"learn2learn": ("maml", "anil", "meta_sgd"), "higher": ("maml",), "torchopt": ("maml",)}
Rule = Callable[[TrainConfig], Iterator[str]]


def find_conflicts(config: TrainConfig, *, trains: bool = True, partial: bool = False) -> list[str]:
    """Return a message for every combination of keys that cannot be trained with.

    Args:
        config: a training's.
        trains: as in ``validate_train_config``.
        partial: keys that are not valid are absent; a rule that needs one of them is left out.
    """
    messages: list[str] = []
    for rule in (*_RULES, _tf32_needs_a_gpu) if trains else _RULES:
        try:
            messages += rule(config)
        except AttributeError:
            if not partial:
                raise
    return messages


def tf32_error(precision: str, device: str) -> str | None:
    """Return why this precision needs another device than one without TF32; ``None`` if it does not."""
    if precision != "tf32":
        return None
    return (
        f"run.precision=tf32: TF32 is how NVIDIA GPUs since Ampere multiply, and run.device is {device}; take "
        "run.precision=float32 (or bfloat16), or such a GPU"
    )


def _tf32_needs_a_gpu(config: TrainConfig) -> Iterator[str]:
    if config.run.device == "cpu" and (message := tf32_error(config.run.precision, "a CPU")):
        yield message


def _auto_engine_is_not_deterministic(config: TrainConfig) -> Iterator[str]:
    if config.inner.engine == "auto" and config.run.deterministic:
        yield (
            "inner.engine=auto with run.deterministic=true: auto chooses by measured times, which differ from run to "
            "run; name an engine"
        )


def _memory_limit_needs_auto(config: TrainConfig) -> Iterator[str]:
    if config.run.memory_limit_mib is not None and config.inner.engine != "auto":
        yield (
            f"run.memory_limit_mib={config.run.memory_limit_mib:g}: only inner.engine=auto heeds it; set that, or "
            "leave it out"
        )


def _unroll_keeps_no_checkpoints(config: TrainConfig) -> Iterator[str]:
    if config.inner.checkpoint_every > 1 and config.inner.engine == "unroll":
        yield (
            f"inner.checkpoint_every={config.inner.checkpoint_every}: inner.engine=unroll keeps graphs and no "
            "checkpoints; take checkpoint, adjoint or auto, or leave it"
        )


def _ways_fit_the_classes(config: TrainConfig) -> Iterator[str]:
    ways, data = config.task.ways, config.data
    if not isinstance(data, (ImagesConfig, SinusoidConfig)) and ways > (found := data.smallest_split())[0]:
        yield f"task.ways={ways}: at most {found[0]}, the smallest part {found[1]}"


def _examples_fit_the_drawings(config: TrainConfig) -> Iterator[str]:
    if isinstance(config.data, (ImagesConfig, SinusoidConfig)):
        return
    task, queries = config.task, max(config.task.queries, config.eval.queries)
    if (each := task.shots + queries) > DRAWINGS_PER_CLASS:
        name = "task.queries" if queries == task.queries else "eval.queries"
        yield (
            f"task.shots={task.shots} and {name}={queries}: together {each}, and a class has {DRAWINGS_PER_CLASS} "
            f"drawings; choose at most {DRAWINGS_PER_CLASS} in all (unless it is set, eval.queries is task.shots)"
        )


def _images_fit_the_model(config: TrainConfig) -> Iterator[str]:
    """Check the size of images after pooling."""
    model, least = config.model, 1
    if isinstance(model, ResNet12Config):
        least = 2 ** len(model.widths)
    elif isinstance(model, Conv4Config) and model.pool == "max":
        least = 16
    if isinstance(config.data, ImagesConfig) and config.data.size < least:
        yield (
            f"data.size={config.data.size}: model={model.name} halves images {least.bit_length() - 1} times and needs "
            f"at least {least} pixels a side"
        )


def _tasks_fit_the_folder(config: TrainConfig) -> Iterator[str]:
    """List a folder of images; none is read."""
    data = config.data
    if isinstance(data, ImagesConfig):
        try:
            splits = list_splits(data.root, fractions=data.fractions, seed=data.seed)
            sizes = {split: [(one.name, len(one.files)) for one in classes] for split, classes in splits.items()}
            check_split_sizes(sizes, data.root, ways=config.task.ways, needed=config.images_per_class())
        except DataError as error:
            yield str(error)


def _sinusoids_need_an_mlp(config: TrainConfig) -> Iterator[str]:
    if isinstance(config.data, SinusoidConfig) and not isinstance(config.model, MLPConfig):
        yield f"model={config.model.name}: data=sinusoid has numbers for inputs, and no images; take model=mlp"


def _optimizer_takes_steps(config: TrainConfig) -> Iterator[str]:
    inner = config.inner
    if inner.optimizer != "sgd" and inner.steps == inner.eval_steps == 0:
        yield f"inner.optimizer={inner.optimizer} with inner.steps=0 and inner.eval_steps=0: it takes no step"


def _context_belongs_to_cavia(config: TrainConfig) -> Iterator[str]:
    name, model = config.algorithm.name, config.model
    context = 0 if isinstance(model, ResNet12Config) else model.context
    if name == "cavia" and not context:
        yield (
            f"algorithm=cavia with model={model.name}: it adapts context parameters, of which the model has none; take "
            "model=conv4 or mlp with model.context=100"
        )
    if name != "cavia" and context:
        yield f"model.context={context}: only algorithm=cavia adapts context parameters; leave it at 0"


def _protonet_needs_classes(config: TrainConfig) -> Iterator[str]:
    if config.algorithm.name == "protonet" and isinstance(config.data, SinusoidConfig):
        yield "algorithm=protonet with data=sinusoid: prototypes are of classes, and numbers have none"


def _needs_steps(config: TrainConfig) -> Iterator[str]:
    name = config.algorithm.name
    if name in ("reptile", "imaml") and config.inner.steps == 0:
        yield f"inner.steps=0 with algorithm={name}: it learns from where the steps lead; take 1 or more"


def _reptile_is_first_order(config: TrainConfig) -> Iterator[str]:
    if config.algorithm.name == "reptile" and config.inner.second_order:
        yield "inner.second_order=true with algorithm=reptile: it has no second order; leave it at false"


def _has_no_engine(config: TrainConfig) -> Iterator[str]:
    name = config.algorithm.name
    if name in ("reptile", "imaml"):
        yield from _only(config, f"algorithm={name}: it has a gradient of its own", _NO_ENGINE)


def _per_step_norm_needs_batch_norm(config: TrainConfig) -> Iterator[str]:
    algorithm, model = config.algorithm, config.model
    if not isinstance(algorithm, MAMLPPConfig) or not isinstance(model, MLPConfig):
        return
    if not model.batch_norm or model.context:
        for key in ("per_step_affine", "per_step_statistics"):
            if getattr(algorithm, key):
                yield f"algorithm.{key}=true with model.batch_norm=false: the model has no BatchNorm; set it to false"


def _cuda_graph_repeats_one_computation(config: TrainConfig) -> Iterator[str]:
    algorithm, why = config.algorithm, ""
    if algorithm.name == "imaml":
        why = "stops where its residual is small"
    elif isinstance(algorithm, MAMLPPConfig) and (algorithm.multi_step_share > 0 or algorithm.first_order_share > 0):
        why = "changes as the training goes on (algorithm.multi_step_share=0 algorithm.first_order_share=0 keep it)"
    if why and config.run.cuda_graph:
        yield (
            f"run.cuda_graph=true with algorithm={algorithm.name}: a graph repeats one computation, and this one {why}"
        )


def _backend_offers_the_algorithm(config: TrainConfig) -> Iterator[str]:
    name, backend = config.algorithm.name, config.algorithm.backend
    if backend != "metalearn" and name not in _BY_BACKENDS[backend]:
        yield (
            f"algorithm.backend={backend} with algorithm={name}: {backend} is trained with for comparison, on "
            f"{', '.join(_BY_BACKENDS[backend])}; take algorithm.backend=metalearn"
        )


def _backend_offers_the_settings(config: TrainConfig) -> Iterator[str]:
    backend = config.algorithm.backend
    if backend != "metalearn":
        settings = _NOT_IN_BACKENDS | (_NOT_IN_LEARN2LEARN if backend == "learn2learn" else {})
        yield from _only(config, f"algorithm.backend={backend}: {backend} has no such thing", settings)


def _only(config: TrainConfig, reason: str, settings: dict[str, object]) -> Iterator[str]:
    """Check that every one of these keys has the only value that it may have."""
    for key, only in settings.items():
        section, _, name = key.partition(".")
        if (value := getattr(getattr(config, section), name)) != only:
            yield f"{key}={value} with {reason}; leave it at {'null' if only is None else str(only).lower()}"


_NO_ENGINE: dict[str, object] = {"inner.engine": "unroll", "inner.checkpoint_every": 1}
_NOT_IN_BACKENDS: dict[str, object] = {
    "inner.clip_norm": None,
    "run.cuda_graph": False,
    "run.precision": "float32",
    "inner.engine": "unroll",
    "inner.task_chunk": None,
}
_NOT_IN_LEARN2LEARN: dict[str, object] = {"inner.optimizer": "sgd", "inner.weight_decay": 0}
_RULES: tuple[Rule, ...] = (
    _auto_engine_is_not_deterministic,
    _memory_limit_needs_auto,
    _unroll_keeps_no_checkpoints,
    _ways_fit_the_classes,
    _examples_fit_the_drawings,
    _images_fit_the_model,
    _tasks_fit_the_folder,
    _sinusoids_need_an_mlp,
    _optimizer_takes_steps,
    _context_belongs_to_cavia,
    _protonet_needs_classes,
    _needs_steps,
    _reptile_is_first_order,
    _has_no_engine,
    _per_step_norm_needs_batch_norm,
    _cuda_graph_repeats_one_computation,
    _backend_offers_the_algorithm,
    _backend_offers_the_settings,
)
