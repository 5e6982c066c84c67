"""Every key of a training: type, range and help in one place; the defaults are in ``conf/``.

pydantic validates a composed configuration against these classes; checks of several keys are in ``compatibility.py``.
To add a key, write it here and in ``conf/``, and use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from typing_extensions import Doc

from metalearn.config.target import check_target

Engine = Literal["unroll", "checkpoint", "adjoint", "auto"]
ENGINES = get_args(Engine)[:-1]
"""Engines to choose or to let ``auto`` choose from; a test holds them equal to ``metalearn.metagrad.ENGINES``."""

PlainAlgorithm = Literal["maml", "anil", "boil", "meta_sgd", "reptile", "cavia", "protonet"]
PLAIN_ALGORITHMS = get_args(PlainAlgorithm)
"""Algorithms without options of their own."""

LARGEST_SEED = 2**63 - 1
"""The largest int64."""

Bool = StrictBool
Text = Annotated[StrictStr, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""Text; a name of digits, such as a folder's, is an integer in YAML."""
Seed = Annotated[StrictInt, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[StrictInt, Field(ge=1)]
Steps = Annotated[StrictInt, Field(ge=0)]
Episodes = Annotated[StrictInt, Field(ge=2)]
Positive = Annotated[StrictFloat, Field(gt=0)]
NonNegative = Annotated[StrictFloat, Field(ge=0)]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]
Momentum = Annotated[StrictFloat, Field(ge=0, lt=1)]
Device = Annotated[
    Text, Field(pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]*))?)$", examples=["auto", "cpu", "cuda", "cuda:N"])
]
OnError = Literal["stop", "skip"]
Target = Annotated[Text, Field(examples=["MODULE:NAME"]), AfterValidator(check_target)]
Options = dict[Annotated[Text, Field(pattern=r"^[^\W\d]\w*$")], Any]


def _check_sum(fractions: list[float]) -> list[float]:
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError("must be three shares that add up to 1, of classes for training, validation and test")
    return fractions


@dataclass(frozen=True)
class Section:
    """A section of a configuration: no unknown key, no NaN, no infinity."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Option(Section):
    """An option of a group."""

    name: Annotated[Text, Doc("of the option")]

    @property
    def label(self) -> str:
        """Name in folders, tables and reports."""
        return self.name


@dataclass(frozen=True)
class CustomOption(Section):
    """Keys of an option that is a user's own code, from any module or a file in the working directory."""

    target: Annotated[Target, Doc("the class or function to call")]
    options: Annotated[Options, Doc("its keyword arguments; options.width=32 sets one")]

    @property
    def label(self) -> str:
        """Name of the class or function."""
        return self.target.partition(":")[2]


@dataclass(frozen=True)
class TaskConfig(Section):
    """What a task is, and how many make a meta-step."""

    ways: Annotated[StrictInt, Field(ge=2), Doc("N, classes per task")]
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
    task_chunk: Annotated[Count | None, Doc("tasks per pass, to save memory; null: all at once")]
    checkpoint_every: Annotated[
        Count, Doc("checkpoint and adjoint keep every s-th step's weights, and recompute others")
    ]
    optimizer: Annotated[
        Literal["sgd", "momentum", "nesterov", "adam", "custom"],
        Doc("update rule of the inner loop; all are differentiated"),
    ]
    optimizer_target: Annotated[Target | None, Doc("with inner.optimizer=custom: what makes the update rule")]
    optimizer_options: Annotated[Options, Doc("with inner.optimizer=custom: its keyword arguments")]
    momentum: Annotated[Momentum, Doc("with inner.optimizer=momentum or nesterov: decay of the velocity")]
    betas: Annotated[
        list[Momentum],
        Field(min_length=2, max_length=2),
        Doc("with inner.optimizer=adam: decay of the mean and of the square"),
    ]
    eps: Annotated[Positive, Doc("with inner.optimizer=adam: added to the root; small ones make meta-gradients large")]
    weight_decay: Annotated[NonNegative, Doc("times the adapted parameters, added to their gradients")]
    clip_norm: Annotated[Positive | None, Doc("largest norm of a task's inner gradient; null: not clipped")]


@dataclass(frozen=True)
class OuterConfig(Section):
    """The meta-optimiser."""

    lr: Annotated[Positive, Doc("Adam's learning rate")]
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
class DataConfig(Option):
    """Base of the options of ``data``."""

    @property
    def is_regression(self) -> bool:
        """Whether targets are numbers instead of classes."""
        return self.name == "sinusoid" or getattr(self, "regression", False)


@dataclass(frozen=True)
class OmniglotConfig(DataConfig):
    """``conf/data/omniglot.yaml``."""

    name: Annotated[Literal["omniglot"], Doc("the data set")]
    root: Annotated[Text | None, Doc("folder that holds omniglot-py/; null: the user's cache, filled by download")]
    fallback: Annotated[Literal["glyphs"] | None, Doc("what to train on where Omniglot is not available; null: stop")]
    split: Annotated[
        Literal["classic", "alphabets"], Doc("classic: 1100/100/423 random classes; alphabets: whole ones")
    ]
    rotations: Annotated[Bool, Doc("rotate training classes by multiples of 90 degrees into new ones")]


@dataclass(frozen=True)
class GlyphsConfig(DataConfig):
    """``conf/data/glyphs.yaml``."""

    name: Annotated[Literal["glyphs"], Doc("the data set")]
    classes: Annotated[StrictInt, Field(ge=20), Doc("characters to invent: 70% to train on, 10% validation, 20% test")]
    jitter: Annotated[NonNegative, Doc("how differently one character is drawn, as a fraction of the image's width")]
    seed: Annotated[Seed, Doc("of the characters and drawings")]


@dataclass(frozen=True)
class ImagesConfig(DataConfig):
    """``conf/data/images.yaml``."""

    name: Annotated[Literal["images"], Doc("the data set")]
    root: Annotated[Text, Doc("folder that holds one folder a class, or train/, val/ and test/ with these")]
    size: Annotated[Count, Doc("height and width that images are cropped and resized to, in pixels")]
    channels: Annotated[Literal[1, 3], Doc("1: grey; 3: colour")]
    fractions: Annotated[
        list[Annotated[StrictFloat, Field(gt=0, le=1)]],
        Field(min_length=3, max_length=3),
        AfterValidator(_check_sum),
        Doc("shares of the classes for training, validation and test, where no folders say so"),
    ]
    seed: Annotated[Seed, Doc("of the split by fractions")]
    on_unreadable: Annotated[OnError, Doc("files that cannot be read: stop, or skip with a warning")]


@dataclass(frozen=True)
class SinusoidConfig(DataConfig):
    """``conf/data/sinusoid.yaml``."""

    name: Annotated[Literal["sinusoid"], Doc("the data set")]


@dataclass(frozen=True)
class CustomDataConfig(CustomOption, DataConfig):
    """``conf/data/custom.yaml``; ``training/custom.py`` says what the target returns."""

    name: Annotated[Literal["custom"], Doc("the data set")]
    regression: Annotated[Bool, Doc("whether targets are numbers instead of classes")]


AnyData = OmniglotConfig | GlyphsConfig | ImagesConfig | SinusoidConfig | CustomDataConfig


@dataclass(frozen=True)
class ModelConfig(Option):
    """Base of the options of ``model``."""


ContextSize = Annotated[Steps, Doc("context parameters, which algorithm=cavia adapts; 0: none")]


@dataclass(frozen=True)
class Conv4Config(ModelConfig):
    """``conf/model/conv4.yaml``."""

    name: Annotated[Literal["conv4"], Doc("the network")]
    width: Annotated[Count, Doc("filters of every convolution")]
    pool: Annotated[Literal["stride", "max"], Doc("stride: stride-2 convolutions (Finn); max: max-pooling (Vinyals)")]
    context: ContextSize


@dataclass(frozen=True)
class MLPConfig(ModelConfig):
    """``conf/model/mlp.yaml``."""

    name: Annotated[Literal["mlp"], Doc("the network")]
    hidden: Annotated[list[Count], Field(min_length=1), Doc("width of each hidden layer")]
    batch_norm: Annotated[Bool, Doc("BatchNorm before each ReLU")]
    context: ContextSize


@dataclass(frozen=True)
class ResNet12Config(ModelConfig):
    """``conf/model/resnet12.yaml``."""

    name: Annotated[Literal["resnet12"], Doc("the network")]
    widths: Annotated[list[Count], Field(min_length=1), Doc("filters of each residual block")]


@dataclass(frozen=True)
class CustomModelConfig(CustomOption, ModelConfig):
    """``conf/model/custom.yaml``."""

    name: Annotated[Literal["custom"], Doc("the network")]


AnyModel = Conv4Config | MLPConfig | ResNet12Config | CustomModelConfig


@dataclass(frozen=True)
class AlgorithmConfig(Option):
    """Base of the options of ``algorithm``."""

    backend: Annotated[
        Literal["metalearn", "learn2learn", "higher", "torchopt"],
        Doc("library that computes the meta-gradient; the others are for comparison"),
    ]


@dataclass(frozen=True)
class PlainAlgorithmConfig(AlgorithmConfig):
    """The algorithms without options of their own, as ``conf/algorithm/maml.yaml``."""

    name: Annotated[PlainAlgorithm, Doc("the meta-learner")]


@dataclass(frozen=True)
class MAMLPPConfig(AlgorithmConfig):
    """``conf/algorithm/maml_pp.yaml``; outer.schedule=cosine is the sixth of its parts."""

    name: Annotated[Literal["maml_pp"], Doc("the meta-learner")]
    learned_lr: Annotated[Bool, Doc("learn a step size for every parameter tensor and inner step (LSLR)")]
    multi_step_share: Annotated[Share, Doc("share of training with the query loss after every step (MSL); 0: none")]
    first_order_share: Annotated[Share, Doc("share of training, from its start, that is first order (DA); 0: none")]
    per_step_affine: Annotated[Bool, Doc("BatchNorm's scale and shift for every inner step, not adapted (BNWB)")]
    per_step_statistics: Annotated[
        Bool, Doc("BatchNorm's statistics for every inner step, to predict queries singly (BNRS)")
    ]


@dataclass(frozen=True)
class IMAMLConfig(AlgorithmConfig):
    """``conf/algorithm/imaml.yaml``."""

    name: Annotated[Literal["imaml"], Doc("the meta-learner")]
    proximal_weight: Annotated[Positive, Doc("lambda, of the pull to theta in the inner problem")]
    cg_steps: Annotated[Count, Doc("conjugate gradients on I + H / lambda, at most")]
    damping: Annotated[NonNegative, Doc("added to the diagonal of that matrix")]


@dataclass(frozen=True)
class CustomAlgorithmConfig(CustomOption, AlgorithmConfig):
    """``conf/algorithm/custom.yaml``; the target is called with an inner loop and the model's parts as well."""

    name: Annotated[Literal["custom"], Doc("the meta-learner")]


AnyAlgorithm = PlainAlgorithmConfig | MAMLPPConfig | IMAMLConfig | CustomAlgorithmConfig


@dataclass(frozen=True)
class RunConfig(Section):
    """Where a run computes, and how reproducibly."""

    seed: Annotated[Seed, Doc("of the initial parameters and of every task")]
    device: Annotated[Device, Doc("auto: the GPU if there is one")]
    resume: Annotated[Bool | Literal["auto"], Doc("true: resume the run in hydra.run.dir; auto: if there is one")]
    init_from: Annotated[Text | None, Doc("folder of a run from whose best parameters to start; null: random ones")]
    checkpoint_every_s: Annotated[
        NonNegative | None, Doc("seconds between checkpoints, beside those at validations; 0: every step; null: none")
    ]
    on_nonfinite: Annotated[
        OnError, Doc("a loss or gradient that is NaN or infinite: stop, or skip and count the meta-step")
    ]
    deterministic: Annotated[Bool, Doc("forbid operations that are not reproducible bit by bit")]
    precision: Annotated[
        Literal["float32", "tf32", "bfloat16"],
        Doc(
            "float32: all its bits, also in GPUs' convolutions, which torch alone would have in TF32; tf32 "
            "(GPUs only) and bfloat16 (autocast): checked against float32 at the start"
        ),
    ]
    cuda_graph: Annotated[Bool, Doc("replay the meta-gradient as one CUDA graph; where that fails, warn and go on")]
    memory_limit_mib: Annotated[Positive | None, Doc("MiB that inner.engine=auto may take; null: most of what is free")]


@dataclass(frozen=True)
class LogConfig(Section):
    """What TensorBoard shows, and how often."""

    every: Annotated[Count, Doc("meta-steps between points in TensorBoard; scalars are means over them")]
    images: Annotated[Bool, Doc("a grid of support and query images with predictions, at each validation")]
    curvature_every: Annotated[
        Count | None, Doc("meta-steps between points of the second-order term (grad/ in the README); null: never")
    ]
    eigenvalue_every: Annotated[
        Count | None, Doc("meta-steps between estimates of the support loss's top eigenvalue (costly); null: never")
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


_NOT_COMPARED = (*("run.resume", "run.checkpoint_every_s", "run.on_nonfinite", "run.cuda_graph"), "data.root")


def result_keys(config: object) -> dict[str, Any]:
    """Return every leaf key and its value, without those that do not change a run's results."""
    return {name: value for name, value in iter_fields(config) if name not in _NOT_COMPARED}
