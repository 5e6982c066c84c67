"""Every key of the options of ``data``, ``model`` and ``algorithm``, one class for each file in their folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, StrictFloat
from typing_extensions import Doc

from metalearn.config.key_types import (
    LATE,
    BatchNormStatistics,
    Bool,
    Count,
    Int,
    NonNegative,
    OnError,
    Options,
    Positive,
    Section,
    Seed,
    Share,
    Steps,
    Target,
    Text,
)
from metalearn.data.class_split import PUBLISHED

PlainAlgorithm = Literal["maml", "anil", "boil", "meta_sgd", "meta_curvature", "reptile", "cavia", "protonet"]
PLAIN_ALGORITHMS = get_args(PlainAlgorithm)
"""Algorithms without options of their own."""


def _check_sum(fractions: list[float]) -> list[float]:
    if abs(sum(fractions) - 1) > 1e-6:
        raise ValueError("must be three shares that add up to 1, of classes for training, validation and test")
    return fractions


def _check_no_boolean(value: object) -> object:
    return str(value) if isinstance(value, bool) else value  # True == 1, so that Literal takes it


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
class DataConfig(Option):
    """Base of the options of ``data``."""

    @property
    def is_regression(self) -> bool:
        """True if targets are numbers instead of classes."""
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
    rotate_test: Annotated[
        Bool, LATE, Doc("rotate validation and test classes as well, as the code of Finn et al. does")
    ]


@dataclass(frozen=True)
class GlyphsConfig(DataConfig):
    """``conf/data/glyphs.yaml``."""

    name: Annotated[Literal["glyphs"], Doc("the data set")]
    classes: Annotated[Int, Field(ge=20), Doc("characters to invent: 70% to train on, 10% validation, 20% test")]
    jitter: Annotated[NonNegative, Doc("how differently one character is drawn, as a fraction of the image's width")]
    seed: Annotated[Seed, Doc("of the characters and drawings")]


ImageSize = Annotated[Count, Doc("height and width that images are cropped and resized to, in pixels")]
Channels = Annotated[Literal[1, 3], BeforeValidator(_check_no_boolean), Doc("1: grey; 3: colour")]
Fractions = Annotated[
    list[Annotated[StrictFloat, Field(gt=0, le=1)]],
    Field(min_length=3, max_length=3),
    AfterValidator(_check_sum),
]
SplitSeed = Annotated[Seed, Doc("of the split by fractions")]
ClassSplit = Annotated[
    Text | dict[Text, list[Text]] | None,
    Field(examples=[*PUBLISHED, "FILE.json", "null"]),
    LATE,
    Doc("names of the classes for training, validation and test, published ones or a file's; null: by data.fractions"),
]


@dataclass(frozen=True)
class ImagesConfig(DataConfig):
    """``conf/data/images.yaml``."""

    name: Annotated[Literal["images"], Doc("the data set")]
    root: Annotated[Text, Doc("folder that holds one folder a class, or train/, val/ and test/ with these")]
    size: ImageSize
    channels: Channels
    fractions: Annotated[
        Fractions, Doc("shares of the classes for training, validation and test, where no folders say so")
    ]
    seed: SplitSeed
    class_split: ClassSplit
    on_unreadable: Annotated[OnError, Doc("files that cannot be read: stop, or skip with a warning")]


@dataclass(frozen=True)
class TorchvisionConfig(DataConfig):
    """``conf/data/torchvision.yaml``."""

    name: Annotated[Literal["torchvision"], Doc("the data set")]
    dataset: Annotated[Text, Doc("class of torchvision.datasets, as CIFAR100; its parts (train, test) are joined")]
    root: Annotated[Text | None, Doc("folder that torchvision looks in; null: torchvision/ in the user's cache")]
    options: Annotated[Options, Doc("keyword arguments of that class; options.split=train takes one part alone")]
    size: ImageSize
    channels: Channels
    fractions: Annotated[Fractions, Doc("shares of the classes for training, validation and test")]
    seed: SplitSeed
    class_split: ClassSplit

    @property
    def label(self) -> str:
        """Name of the data set."""
        return self.dataset


@dataclass(frozen=True)
class SinusoidConfig(DataConfig):
    """``conf/data/sinusoid.yaml``."""

    name: Annotated[Literal["sinusoid"], Doc("the data set")]


@dataclass(frozen=True)
class CustomDataConfig(CustomOption, DataConfig):
    """``conf/data/custom.yaml``; ``training/custom.py`` says what the target returns."""

    name: Annotated[Literal["custom"], Doc("the data set")]
    regression: Annotated[Bool, Doc("whether targets are numbers instead of classes")]


AnyData = OmniglotConfig | GlyphsConfig | ImagesConfig | TorchvisionConfig | SinusoidConfig | CustomDataConfig


@dataclass(frozen=True)
class ModelConfig(Option):
    """Base of the options of ``model``."""


ContextSize = Annotated[Steps, LATE, Doc("context parameters, which algorithm=cavia adapts; 0: none")]


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
    batch_norm: Annotated[
        BatchNormStatistics,
        LATE,
        Doc("running statistics: task normalises by a task's own examples, frozen by the stored ones; null: none kept"),
    ]


AnyModel = Conv4Config | MLPConfig | ResNet12Config | CustomModelConfig


@dataclass(frozen=True)
class AlgorithmConfig(Option):
    """Base of the options of ``algorithm``."""

    backend: Annotated[
        Literal["metalearn", "learn2learn", "higher", "torchopt"],
        LATE,
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
