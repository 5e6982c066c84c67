"""Every key of the commands beside training. Imports neither torch nor Hydra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, StrictFloat
from typing_extensions import Doc

from metalearn.config.key_types import (
    BatchNormStatistics,
    Bool,
    Count,
    Device,
    Episodes,
    Int,
    OnError,
    Options,
    Positive,
    Section,
    Seed,
    Steps,
    Target,
    Text,
)
from metalearn.config.schema import TrainConfig

Lesson = Literal[
    "all", "create_graph", "backward", "orders", "graph", "hvp", "dense_hessian", "finite_differences", "big_product",
    "newton", "sharpness", "pinn", "maml",
]  # fmt: skip
LESSONS = get_args(Lesson)[1:]
"""Names for ``lesson`` in teaching order; a test holds them equal to ``metalearn.lessons.LESSONS``."""

TrustCode = Annotated[Bool, Doc("run the user's own code that the run's config.yaml names, if any")]
Repeats = Annotated[Int, Field(ge=2)]


@dataclass(frozen=True)
class BenchConfig(Section):
    """Measurements to make, and how long each takes."""

    kind: Annotated[
        Literal["peers", "engines", "float32", "sweeps"],
        Doc(
            "peers: a meta-step beside other libraries; engines: memory and time of every engine against "
            "K; float32: its distance to float64; sweeps: how cost grows with K, tasks, ways and width"
        ),
    ]
    repeats: Annotated[Repeats, Doc("times that every method is timed, in turns; with bench.kind=float32: seeds")]
    setting: Annotated[
        Text,
        Doc(
            "one of the kind's settings, which the message about an unknown one lists, or all; configured, with "
            "bench.kind=peers: the configuration's own meta-step"
        ),
    ]
    memory_limit_mib: Annotated[Positive, Doc("with bench.kind=engines: MiB at which a measurement is stopped")]


@dataclass(frozen=True)
class BenchmarkConfig(TrainConfig):
    """``conf/benchmark.yaml``: a training's configuration, of which one meta-step may be timed."""

    bench: BenchConfig


@dataclass(frozen=True)
class EvaluateRunConfig(Section):
    """Which run, and where to test it."""

    dir: Annotated[Text, Doc("a run's folder, an exported file, or a shipped model (run= is short)")]
    device: Annotated[Device | None, Doc("null: as the run was trained")]
    trust_code: TrustCode


@dataclass(frozen=True)
class EvaluateEvalConfig(Section):
    """Size of the test."""

    episodes: Annotated[Episodes | None, Doc("tasks of test classes; null: as in the run")]
    queries: Annotated[Count | None, Doc("query examples per class; null: as in the run")]


@dataclass(frozen=True)
class EvaluateDataConfig(Section):
    """Where the data lies now, and which protocol is tested."""

    root: Annotated[Text | None, Doc("folder of the data set; null: as in the run, or for Omniglot METALEARN_DATA")]
    rotate_test: Annotated[Bool | None, Doc("of Omniglot: rotate test classes as well; null: as in the run")]


@dataclass(frozen=True)
class EvaluateConfig(Section):
    """``conf/evaluate.yaml``."""

    run: EvaluateRunConfig
    eval: EvaluateEvalConfig
    data: EvaluateDataConfig


@dataclass(frozen=True)
class AdaptRunConfig(Section):
    """Which run, and where to compute."""

    dir: Annotated[Text, Doc("a run's folder, an exported file, or a shipped model; run= is short for it")]
    device: Annotated[Device, Doc("auto: the GPU if there is one")]
    trust_code: TrustCode


@dataclass(frozen=True)
class AdaptConfig(Section):
    """``conf/adapt.yaml``."""

    run: AdaptRunConfig
    support: Annotated[Text | None, Doc("folder with one folder a class, one image or more in each, to adapt to")]
    query: Annotated[Text | None, Doc("images to predict, or folders of classes; null: only adapt and save")]
    weights: Annotated[Text | None, Doc("adapted weights that were saved before, in the place of support")]
    steps: Annotated[Steps | None, Doc("inner steps; null: the run's inner.eval_steps")]
    invert: Annotated[
        Bool | Literal["auto"],
        Doc(
            "exchange black and white, as of dark ink on paper for a run of light ink on black; auto: "
            "where the images' borders are light and those of the run's data (Omniglot, glyphs) dark"
        ),
    ]
    on_unreadable: Annotated[OnError, Doc("files that cannot be read: stop, or skip with a warning")]
    save: Annotated[Text | None, Doc("file for the adapted weights; null: adapted.safetensors in the output folder")]


@dataclass(frozen=True)
class GradientsConfig(Section):
    """``conf/gradients.yaml``."""

    lesson: Annotated[Lesson, Doc("the lesson on second-order gradients to run, or all of them")]


@dataclass(frozen=True)
class VerifyRunConfig(Section):
    """Where the engines are tried, and in which precision."""

    seed: Annotated[Seed, Doc("of parameters, images and dropout")]
    device: Annotated[Device, Doc("auto: the GPU if there is one")]
    dtype: Annotated[Literal["float64", "float32"], Doc("float64 proves formulas; float32 shows rounding as well")]


@dataclass(frozen=True)
class VerifyCasesConfig(Section):
    """Inner loops and inputs that the engines are tried on."""

    steps: Annotated[list[Count], Field(min_length=1), Doc("numbers of inner steps K")]
    example_shape: Annotated[list[Count], Field(min_length=1), Doc("of one input of model.target")]


@dataclass(frozen=True)
class VerifyModelConfig(Section):
    """A network of the user's own, by the keys of a training."""

    name: Annotated[Literal["custom"], Doc("a network of your own, beside the built-in ones")]
    target: Annotated[Target | None, Doc("makes the network; null: there is none")]
    options: Annotated[Options, Doc("its keyword arguments")]
    batch_norm: Annotated[BatchNormStatistics, Doc("of its running statistics, as in a training")]


@dataclass(frozen=True)
class VerifyInnerConfig(Section):
    """An update rule of the user's own, by the keys of a training."""

    optimizer: Annotated[Literal["sgd", "custom"], Doc("custom: try an update rule of your own as well")]
    optimizer_target: Annotated[Target | None, Doc("with inner.optimizer=custom: what makes it")]
    optimizer_options: Annotated[Options, Doc("with inner.optimizer=custom: its keyword arguments")]


@dataclass(frozen=True)
class VerifyConfig(Section):
    """``conf/verify.yaml``."""

    run: VerifyRunConfig
    verify: VerifyCasesConfig
    model: VerifyModelConfig
    inner: VerifyInnerConfig

    def targets(self) -> dict[str, str]:
        """Return every key that names a user's own code, and its value."""
        keys = {"model.target": self.model.target, "inner.optimizer_target": self.inner.optimizer_target}
        return {key: target for key, target in keys.items() if target is not None}


@dataclass(frozen=True)
class CompareSettings(Section):
    """Variants, seeds, and how they are compared."""

    variants: Annotated[
        list[Text], Field(min_length=1), Doc("what to compare, each a list of overrides with spaces between them")
    ]
    seeds: Annotated[list[Seed], Field(min_length=1), Doc("values of run.seed; every variant is trained with each")]
    jobs: Annotated[Count | None, Doc("runs at a time on this machine; null: one per core, or one on a GPU")]
    target_accuracy: Annotated[
        Annotated[StrictFloat, Field(gt=0, le=1)] | None,
        Doc("validation accuracy whose time is reported; null: the highest that all, or half, of the runs reach"),
    ]
    steps: Annotated[
        list[Count],
        Field(min_length=1),
        Doc("numbers K of inner steps at which every engine is measured, beside inner.steps"),
    ]
    repeats: Annotated[Repeats, Doc("times that every engine is timed, in turns")]
    memory_limit_mib: Annotated[Positive, Doc("MiB at which a measurement of memory is stopped")]
    resume: Annotated[Bool, Doc("resume an unfinished comparison of this configuration; false: start another")]


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """``conf/compare.yaml``: the configuration that all variants share."""

    compare: CompareSettings


@dataclass(frozen=True)
class ReproduceConfig(Section):
    """``conf/reproduce.yaml``."""

    experiment_name: Annotated[Text, Doc("the experiment to reproduce, a file in conf/experiment/")]
    orders: Annotated[
        list[Literal["second", "first"]], Field(min_length=1), Doc("second: MAML; first: its first-order approximation")
    ]
    seeds: Annotated[list[Seed], Field(min_length=1), Doc("values of run.seed; each order is trained with each")]
    time_limit_minutes: Annotated[
        Annotated[StrictFloat, Field(gt=0, le=1e6)] | None,
        Doc("when to stop; the same command resumes; null: when all is finished"),
    ]
    jobs: Annotated[Count, Doc("runs at a time on this machine")]
    overrides: Annotated[list[Text], Doc("more keys of scripts/train.py, for every run")]
    update_reference: Annotated[Bool, Doc("also write results to outputs/reference/omniglot.json")]
