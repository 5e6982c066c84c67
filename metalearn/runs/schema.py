"""Every key of a training: its type, what it means, and what is allowed. Imports neither torch nor Hydra.

Defaults are not here but in ``conf/``: a default lives in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from metalearn.data.catalog import GLYPH_SHARES, OMNIGLOT_SPLITS, glyph_splits

ENGINES = ("unroll", "checkpoint", "adjoint")
"""Names for ``inner.engine``; a test holds them equal to ``metalearn.metagrad.ENGINES``, which needs torch."""

LARGEST_SEED = 2**63 - 1
"""The largest int64."""


def key(
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | None = None,
    may_be_empty: bool = False,
) -> Any:
    """A configuration key without a default, with what ``--help`` says of it and the range that is checked."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "choices": choices}
    limits["may_be_empty"] = may_be_empty
    return field(default=MISSING, metadata={"meaning": meaning, **limits})


@dataclass
class TaskConfig:
    """What a task is, and how many make a meta-step."""

    ways: int = key("N, classes per task", at_least=2)
    shots: int = key("support examples per class", at_least=1)
    queries: int = key("query examples per class", at_least=1)
    meta_batch: int = key("T, tasks per meta-step, and tasks at a time in evaluation", at_least=1)


@dataclass
class InnerConfig:
    """The inner loop, and how it is differentiated."""

    lr: float = key("step size of the inner gradient descent", above=0)
    steps: int = key("inner steps in training", at_least=0)
    eval_steps: int = key("inner steps in validation and test; may differ from inner.steps", at_least=0)
    second_order: bool = key("differentiate through the inner gradients (MAML); false: first-order MAML")
    engine: str = key(
        "how the meta-gradient is computed; auto: the fastest that fits run.memory_limit", choices=(*ENGINES, "auto")
    )
    task_chunk: int | None = key("tasks per pass, to save memory; null: all at once", at_least=1)
    snapshot_every: int = key("checkpoint and adjoint keep every s-th step's weights, and recompute others", at_least=1)


@dataclass
class OuterConfig:
    """The meta-optimiser."""

    lr: float = key("Adam's learning rate", above=0)
    iterations: int = key("meta-steps", at_least=1)
    schedule: str = key("learning rate over the run; cosine falls to 0", choices=("constant", "cosine"))
    clip_norm: float | None = key("largest global norm of the meta-gradient; null: not clipped", above=0)


@dataclass
class EvalConfig:
    """Validation and test."""

    every: int = key("meta-steps between validations", at_least=1)
    queries: int = key("query examples per class in validation and test; Finn et al. take as many as shots", at_least=1)
    validation_episodes: int = key("tasks of validation classes in each validation", at_least=2)
    episodes: int = key("tasks of test classes in the final test", at_least=2)


@dataclass
class DataConfig:
    """Base of the options of ``data``."""

    name: str = key("the data set")

    def smallest_split(self) -> tuple[int, str]:
        """Classes in the smallest split, and its description."""
        raise NotImplementedError


@dataclass
class OmniglotConfig(DataConfig):
    """``conf/data/omniglot.yaml``."""

    name: str = key("the data set", choices=("omniglot",))
    root: str | None = key("folder that holds omniglot-py/; null: the user's cache, filled by download")
    fallback: str | None = key("what to train on where Omniglot cannot be had; null: stop", choices=("glyphs",))
    split: str = key("classic: 1100/100/423 random classes; alphabets: whole ones", choices=tuple(OMNIGLOT_SPLITS))
    rotations: bool = key("rotate training classes by multiples of 90 degrees into new ones")

    def smallest_split(self) -> tuple[int, str]:
        """As the base says."""
        return OMNIGLOT_SPLITS[self.split].smallest, f"of Omniglot's {self.split} split"


@dataclass
class GlyphsConfig(DataConfig):
    """``conf/data/glyphs.yaml``."""

    name: str = key("the data set", choices=("glyphs",))
    classes: int = key("characters to invent: 70% to train on, 10% validation, 20% test", at_least=20)
    jitter: float = key("how differently one character is drawn, as a fraction of the image's width", at_least=0)
    seed: int = key("of the characters and drawings", at_least=0, at_most=LARGEST_SEED)

    def smallest_split(self) -> tuple[int, str]:
        """As the base says."""
        return glyph_splits(self.classes).smallest, f"of {self.classes} glyphs ({GLYPH_SHARES[1]:.0%} validate)"


@dataclass
class ModelConfig:
    """Base of the options of ``model``."""

    name: str = key("the network")


@dataclass
class Conv4Config(ModelConfig):
    """``conf/model/conv4.yaml``."""

    name: str = key("the network", choices=("conv4",))
    width: int = key("filters of every convolution", at_least=1)
    pool: str = key("stride: stride-2 convolutions (Finn); max: max-pooling (Vinyals)", choices=("stride", "max"))


@dataclass
class MLPConfig(ModelConfig):
    """``conf/model/mlp.yaml``."""

    name: str = key("the network", choices=("mlp",))
    hidden: list[int] = key("width of each hidden layer", at_least=1)
    batch_norm: bool = key("BatchNorm before each ReLU")


@dataclass
class AlgorithmConfig:
    """``conf/algorithm/``."""

    name: str = key("the meta-learner", choices=("maml",))


@dataclass
class RunConfig:
    """Where and how reproducibly."""

    seed: int = key("of the initial parameters and of every task", at_least=0, at_most=LARGEST_SEED)
    device: str = key("auto: the GPU if there is one; or cpu, cuda, cuda:N")
    resume: bool | str = key(
        "true: go on with the run in hydra.run.dir; auto: if there is one, else start it",
        choices=("false", "true", "auto"),
    )
    accept: list[str] = key(
        "keys that may have another value than the run that is resumed was begun with", may_be_empty=True
    )
    checkpoint_seconds: float | None = key(
        "seconds between checkpoints, beside one at each validation; 0: after every step; null: no others",
        at_least=0,
    )
    on_nonfinite: str = key(
        "a loss or gradient that is NaN or infinite: stop, or skip that meta-step and count it",
        choices=("stop", "skip"),
    )
    deterministic: bool = key("refuse operations that are not reproducible bit by bit")
    precision: str = key(
        "float32: all its bits, also in GPUs' convolutions, which torch alone would have in TF32; tf32 (GPUs only) and "
        "bfloat16 (autocast): checked against float32 at the start",
        choices=("float32", "tf32", "bfloat16"),
    )
    cuda_graph: bool = key("replay the meta-gradient as one CUDA graph; where that fails, say so and go on without")
    memory_limit: float | None = key("MiB that inner.engine=auto may take; null: most of what is free", above=0)


@dataclass
class LogConfig:
    """What TensorBoard is shown, and how often."""

    every: int = key("meta-steps between points in TensorBoard; figures are means over them", at_least=1)
    images: bool = key("a grid of support and query images with predictions, at each validation")
    curvature_every: int | None = key(
        "meta-steps between looks at the second-order term (see grad/ in the README); null: never", at_least=1
    )
    eigenvalue_every: int | None = key(
        "meta-steps between estimates of the support loss's largest eigenvalue (costly); null: never",
        at_least=1,
    )


@dataclass
class TrainConfig:
    """``conf/train.yaml``."""

    task: TaskConfig = field(default_factory=TaskConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)
