"""Every key of a training: type, range and help in one place; the defaults are in ``conf/``.

pydantic validates a composed configuration against these classes. Those of the groups are in ``options.py``, checks of
several keys in ``compatibility.py``. To add a key, write it here and in ``conf/``, and use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from typing_extensions import Doc

from metalearn.config.key_types import (
    LATE,
    Bool,
    Count,
    Device,
    Episodes,
    Int,
    LearningRate,
    Momentum,
    NonNegative,
    OnError,
    Options,
    Positive,
    Section,
    Seed,
    Steps,
    Target,
    Text,
)
from metalearn.config.options import AnyAlgorithm, AnyData, AnyModel, CustomOption

Engine = Literal["unroll", "checkpoint", "adjoint", "auto"]
ENGINES = get_args(Engine)[:-1]
"""Engines to choose or to let ``auto`` choose from; a test holds them equal to ``metalearn.metagrad.ENGINES``."""


@dataclass(frozen=True)
class TaskConfig(Section):
    """Size of a task, and tasks per meta-step."""

    ways: Annotated[Int, Field(ge=2), Doc("N, classes per task")]
    shots: Annotated[Count, Doc("support examples per class")]
    queries: Annotated[Count, Doc("query examples per class")]
    meta_batch: Annotated[Count, Doc("T, tasks per meta-step, and tasks at a time in evaluation")]


@dataclass(frozen=True)
class InnerConfig(Section):
    """The inner loop, and how it is differentiated."""

    lr: Annotated[Positive, Doc("step size of the inner gradient descent")]
    steps: Annotated[Steps, Doc("inner steps in training")]
    eval_steps: Annotated[Steps, Doc("inner steps in validation and test; may differ from inner.steps")]
    second_order: Annotated[Bool, Doc("differentiate through the inner gradients (MAML); false: first-order MAML")]
    engine: Annotated[Engine, Doc("computes the meta-gradient; auto: the fastest that fits run.memory_limit_mib")]
    task_chunk: Annotated[Count | None, Doc("tasks per pass, to save memory; null: as many as are fast, on a GPU all")]
    checkpoint_every: Annotated[
        Count, LATE, Doc("checkpoint and adjoint keep every s-th step's weights, and recompute others")
    ]
    optimizer: Annotated[
        Literal["sgd", "momentum", "nesterov", "adam", "custom"],
        LATE,
        Doc("update rule of the inner loop; all are differentiated"),
    ]
    optimizer_target: Annotated[Target | None, LATE, Doc("with inner.optimizer=custom: what makes the update rule")]
    optimizer_options: Annotated[Options, LATE, Doc("with inner.optimizer=custom: its keyword arguments")]
    momentum: Annotated[Momentum, LATE, Doc("with inner.optimizer=momentum or nesterov: decay of the velocity")]
    betas: Annotated[
        list[Momentum],
        Field(min_length=2, max_length=2),
        LATE,
        Doc("with inner.optimizer=adam: decay of the mean and of the square"),
    ]
    eps: Annotated[
        Positive, LATE, Doc("with inner.optimizer=adam: added to the root; a small one makes meta-gradients large")
    ]
    weight_decay: Annotated[NonNegative, LATE, Doc("times the adapted parameters, added to their gradients")]
    clip_norm: Annotated[Positive | None, LATE, Doc("largest norm of a task's inner gradient; null: not clipped")]


@dataclass(frozen=True)
class OuterConfig(Section):
    """The meta-optimiser."""

    lr: Annotated[LearningRate, Doc("Adam's learning rate")]
    iterations: Annotated[Count, Doc("meta-steps")]
    schedule: Annotated[Literal["constant", "cosine"], Doc("learning rate over the run; cosine falls to 0")]
    clip_norm: Annotated[Positive | None, Doc("largest global norm of the meta-gradient; null: not clipped")]


@dataclass(frozen=True)
class EvalConfig(Section):
    """Validation and test."""

    every: Annotated[Count, Doc("meta-steps between validations")]
    queries: Annotated[Count, Doc("query examples per class in validation and test; Finn et al. take as many as shots")]
    validation_episodes: Annotated[Episodes, Doc("tasks of validation classes in each validation")]
    episodes: Annotated[Episodes, Doc("tasks of test classes in the final test")]


@dataclass(frozen=True)
class RunConfig(Section):
    """Where a run computes, and how reproducibly."""

    seed: Annotated[Seed, Doc("of the initial parameters and of every task")]
    device: Annotated[Device, Doc("auto: the GPU if there is one")]
    resume: Annotated[Bool | Literal["auto"], LATE, Doc("true: resume the run in hydra.run.dir; auto: if there is one")]
    init_from: Annotated[Text | None, LATE, Doc("run from whose best parameters to start; null: random ones")]
    checkpoint_every_s: Annotated[
        NonNegative | None,
        LATE,
        Doc("seconds between checkpoints, beside validations'; 0: every step; null: none"),
    ]
    on_nonfinite: Annotated[
        OnError, LATE, Doc("a loss or gradient that is NaN or infinite: stop, or skip and count the meta-step")
    ]
    threads: Annotated[
        Count | Literal["auto"],
        LATE,
        Doc("CPU threads; auto: one or all, whichever is faster at the start and at validations; in a benchmark: all"),
    ]
    deterministic: Annotated[Bool, Doc("forbid operations that are not reproducible bit by bit")]
    precision: Annotated[
        Literal["float32", "tf32", "bfloat16"],
        LATE,
        Doc(
            "float32: all its bits, also in GPUs' convolutions, which torch alone would have in TF32; tf32 "
            "(GPUs only) and bfloat16 (autocast): checked against float32 at the start"
        ),
    ]
    cuda_graph: Annotated[
        Bool | Literal["auto"],
        LATE,
        Doc("replay the meta-gradient as one CUDA graph; if that fails, warn and run without; auto: on GPUs"),
    ]
    memory_limit_mib: Annotated[
        Positive | None, LATE, Doc("MiB that inner.engine=auto may take; null: most that is free")
    ]


@dataclass(frozen=True)
class LogConfig(Section):
    """Contents of TensorBoard, and how often they are written."""

    every: Annotated[Count, Doc("meta-steps between points in TensorBoard; scalars are means over them")]
    images: Annotated[Bool, Doc("a grid of support and query images with predictions, at each validation")]
    curvature_every: Annotated[
        Count | None, LATE, Doc("meta-steps between looks at the second-order term, from the first on; null: never")
    ]
    eigenvalue_every: Annotated[
        Count | None,
        LATE,
        Doc("meta-steps between the support loss's top eigenvalues (costly); null: never"),
    ]


@dataclass(frozen=True)
class TrainConfig(Section):
    """``conf/train.yaml``."""

    task: TaskConfig
    inner: InnerConfig
    outer: OuterConfig
    eval: EvalConfig
    data: Annotated[AnyData, Field(discriminator="name")]
    model: Annotated[AnyModel, Field(discriminator="name")]
    algorithm: Annotated[AnyAlgorithm, Field(discriminator="name")]
    run: RunConfig
    log: LogConfig

    def targets(self) -> dict[str, str]:
        """Return every key that names a user's own code, and its value."""
        sections = {f"{name}.target": getattr(self, name) for name in ("data", "model", "algorithm")}
        found = {key: section.target for key, section in sections.items() if isinstance(section, CustomOption)}
        rule = self.inner.optimizer_target
        return found | ({"inner.optimizer_target": rule} if rule else {})

    def images_per_class(self) -> dict[str, int]:
        """Return the images that a task takes of a class, shots and queries, in each split."""
        train, evaluation = (self.task.shots + queries for queries in (self.task.queries, self.eval.queries))
        return {"train": train, "validation": evaluation, "test": evaluation}


def iter_fields(config: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over every leaf key of a configuration and its value, as ``("inner.lr", 0.4)``."""
    assert is_dataclass(config)
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from iter_fields(value, f"{prefix}{f.name}.")
        elif isinstance(value, dict):
            yield from ((f"{prefix}{f.name}.{key}", one) for key, one in value.items())
        else:
            yield f"{prefix}{f.name}", value


_NOT_COMPARED = (
    *("run.resume", "run.checkpoint_every_s", "run.on_nonfinite", "run.cuda_graph", "run.threads"),
    *("log.every", "log.images", "log.curvature_every", "log.eigenvalue_every"),
    "data.root",
)


def result_keys(config: object) -> dict[str, Any]:
    """Return every leaf key and its value, without those that do not change a run's results."""
    return {name: value for name, value in iter_fields(config) if name not in _NOT_COMPARED}
