"""Every key of a training: its type, what it means, and what is allowed. Imports neither torch nor Hydra.

Defaults are not here but in ``conf/``: a default lives in one place.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from metalearn.data.image_folder import list_splits
from metalearn.data.metadata import GLYPH_SPLIT_FRACTIONS, OMNIGLOT_SPLITS, glyph_split_sizes

ENGINES = ("unroll", "checkpoint", "adjoint")
"""Names for ``inner.engine``; a test holds them equal to ``metalearn.metagrad.ENGINES``, which needs torch."""

PLAIN_ALGORITHMS = ("maml", "anil", "boil", "meta_sgd", "reptile", "cavia", "protonet")
"""Names for ``algorithm`` of those without keys of their own; a test holds the rest to ``metalearn.algorithms``."""

BACKENDS = ("metalearn", "learn2learn", "higher", "torchopt")
"""Names for ``algorithm.backend``."""

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
    rule: str = key("the update rule, differentiated as the rest", choices=("sgd", "momentum", "nesterov", "adam"))
    momentum: float = key("of the rules momentum and nesterov", at_least=0, at_most=1)
    betas: list[float] = key("of the rule adam: how slowly its two averages move", at_least=0, at_most=1)
    eps: float = key("of the rule adam: added to the root; small ones make meta-gradients large", above=0)
    weight_decay: float = key("times the adapted parameters, added to their gradients", at_least=0)
    clip_norm: float | None = key("largest norm of a task's inner gradient; null: not clipped", above=0)


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
        return glyph_split_sizes(
            self.classes
        ).smallest, f"of {self.classes} glyphs ({GLYPH_SPLIT_FRACTIONS[1]:.0%} validate)"


@dataclass
class ImagesConfig(DataConfig):
    """``conf/data/images.yaml``."""

    name: str = key("the data set", choices=("images",))
    root: str = key("folder that holds one folder a class, or train/, val/ and test/ with these")
    size: int = key("height and width that images are cropped and resized to, in pixels", at_least=1)
    channels: int = key("1: grey; 3: colour", at_least=1, at_most=3)
    fractions: list[float] = key(
        "shares of the classes for training, validation and test, where no folders say so", above=0, at_most=1
    )
    seed: int = key("of that split", at_least=0, at_most=LARGEST_SEED)
    unreadable: str = key("files that cannot be read: stop, or skip them with a warning", choices=("stop", "skip"))

    def smallest_split(self) -> tuple[int, str]:
        """As the base says; the folder is listed for it."""
        splits = list_splits(self.root, fractions=self.fractions, seed=self.seed)
        return min(map(len, splits.values())), f"of the images in {self.root}"


@dataclass
class SinusoidConfig(DataConfig):
    """``conf/data/sinusoid.yaml``."""

    name: str = key("the data set", choices=("sinusoid",))

    def smallest_split(self) -> tuple[int, str]:
        """As the base says."""
        return sys.maxsize, "of sinusoids, of which there is no end"


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
    context: int = key("context parameters, which algorithm=cavia adapts; 0: none", at_least=0)


@dataclass
class MLPConfig(ModelConfig):
    """``conf/model/mlp.yaml``."""

    name: str = key("the network", choices=("mlp",))
    hidden: list[int] = key("width of each hidden layer", at_least=1)
    batch_norm: bool = key("BatchNorm before each ReLU")
    context: int = key("context parameters, which algorithm=cavia adapts; 0: none", at_least=0)


@dataclass
class ResNet12Config(ModelConfig):
    """``conf/model/resnet12.yaml``."""

    name: str = key("the network", choices=("resnet12",))
    widths: list[int] = key("filters of each residual block", at_least=1)


@dataclass
class AlgorithmConfig:
    """Base of the options of ``algorithm``, and all keys of most of them."""

    name: str = key("the meta-learner", choices=PLAIN_ALGORITHMS)
    backend: str = key("whose meta-gradient is trained with; the others are for comparison", choices=BACKENDS)


@dataclass
class MAMLPPConfig(AlgorithmConfig):
    """``conf/algorithm/maml_pp.yaml``; outer.schedule=cosine is the sixth of its parts."""

    name: str = key("the meta-learner", choices=("maml_pp",))
    learned_lr: bool = key("learn a step size for every parameter tensor and inner step (LSLR)")
    multi_step_share: float = key(
        "share of the training in which the query loss after every step counts (MSL); 0: in none", at_least=0, at_most=1
    )
    first_order_share: float = key(
        "share of the training that is first order, before the second begins (DA); 0: none", at_least=0, at_most=1
    )
    per_step_affine: bool = key("BatchNorm's scale and shift for every inner step, not adapted (BNWB)")
    per_step_statistics: bool = key(
        "BatchNorm's statistics for every inner step, by which queries are predicted one by one (BNRS)"
    )


@dataclass
class IMAMLConfig(AlgorithmConfig):
    """``conf/algorithm/imaml.yaml``."""

    name: str = key("the meta-learner", choices=("imaml",))
    strength: float = key("lambda, of the pull to theta in the inner problem", above=0)
    cg_steps: int = key("conjugate gradients on I + H / lambda, at most", at_least=1)
    damping: float = key("added to the diagonal of that matrix", at_least=0)


@dataclass
class RunConfig:
    """Where and how reproducibly."""

    seed: int = key("of the initial parameters and of every task", at_least=0, at_most=LARGEST_SEED)
    device: str = key("auto: the GPU if there is one; or cpu, cuda, cuda:N")
    resume: bool | str = key(
        "true: go on with the run in hydra.run.dir; auto: if there is one, else start it",
        choices=("false", "true", "auto"),
    )
    init_from: str | None = key("folder of another run, from whose best parameters this one starts")
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

    def images_per_class(self) -> dict[str, int]:
        """Images that a task takes of a class, shots and queries, in each split."""
        in_training, later = (self.task.shots + queries for queries in (self.task.queries, self.eval.queries))
        return {"train": in_training, "validation": later, "test": later}
