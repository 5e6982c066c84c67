"""Every key of the commands beside training. Imports neither torch nor Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field

from metalearn.config.schema import LARGEST_SEED, TrainConfig, key

LESSONS = (
    "create_graph",
    "backward",
    "orders",
    "graph",
    "hvp",
    "dense_hessian",
    "finite_differences",
    "big_product",
    "newton",
    "sharpness",
    "pinn",
    "maml",
)
"""Names for ``lesson`` in teaching order; a test holds them equal to ``metalearn.lessons.LESSONS``."""


BENCH_SETTINGS = (
    *("all", "configured", "5way_1shot", "20way_1shot", "5way_1shot_15queries"),
    *("5way_5shot", "20way_1shot_wide"),
    *("5way_K1", "5way_K5", "20way_K1", "20way_K5"),
    *("steps", "tasks", "ways", "width"),
)
"""Names for ``bench.setting``; a test holds them equal to what ``commands/benchmark`` allows for each kind."""


@dataclass
class BenchConfig:
    """What to measure, and how long."""

    kind: str = key(
        "peers: a meta-step beside other libraries; engines: memory and time of every engine against K; "
        "float32: its distance to float64; sweeps: how cost grows with K, tasks, ways and width",
        choices=("peers", "engines", "float32", "sweeps"),
    )
    rounds: int = key("times that every contender is timed, in turns; with bench.kind=float32: seeds", at_least=2)
    setting: str = key(
        "one of the kind's settings, or all; configured, with bench.kind=peers: the configuration's own meta-step",
        choices=BENCH_SETTINGS,
    )
    limit_mib: float = key("with bench.kind=engines: MiB at which a contender is stopped", above=0)


@dataclass
class BenchmarkConfig(TrainConfig):
    """``conf/benchmark.yaml``: a training's configuration, of which one meta-step may be timed."""

    bench: BenchConfig = field(default_factory=BenchConfig)


@dataclass
class EvaluateRunConfig:
    """Which run, and where to test it."""

    dir: str = key("folder of the run to test")
    device: str | None = key("null: as the run was trained; or auto, cpu, cuda, cuda:N")


@dataclass
class EvaluateEvalConfig:
    """How much to test."""

    episodes: int | None = key("tasks of test classes; null: as the run says", at_least=2)
    queries: int | None = key("query examples per class; null: as the run says", at_least=1)


@dataclass
class EvaluateDataConfig:
    """Where the data lies now."""

    root: str | None = key("folder that holds omniglot-py/; null: the run's own, or METALEARN_DATA if that is gone")


@dataclass
class EvaluateConfig:
    """``conf/evaluate.yaml``."""

    run: EvaluateRunConfig = field(default_factory=EvaluateRunConfig)
    eval: EvaluateEvalConfig = field(default_factory=EvaluateEvalConfig)
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)


@dataclass
class AdaptRunConfig:
    """Which run, and where to compute."""

    dir: str = key("folder of the run whose best checkpoint is adapted; nothing is written there")
    device: str = key("auto: the GPU if there is one; or cpu, cuda, cuda:N")


@dataclass
class AdaptConfig:
    """``conf/adapt.yaml``."""

    run: AdaptRunConfig = field(default_factory=AdaptRunConfig)
    support: str | None = key("folder with one folder a class, one image or more in each, to adapt to")
    query: str | None = key("images to predict: a folder of them, or of classes; null: none, only adapt and save")
    weights: str | None = key("adapted weights that were saved before, in the place of support")
    steps: int | None = key("inner steps; null: the run's inner.eval_steps", at_least=0)
    invert: bool | str = key(
        "exchange black and white, as of dark ink on paper for a run of light ink on black; auto: where the images' "
        "borders are light and those of the run's data (Omniglot, glyphs) dark",
        choices=("false", "true", "auto"),
    )
    unreadable: str = key("files that cannot be read: stop, or skip them with a warning", choices=("stop", "skip"))
    save: str | None = key("file for the adapted weights; null: adapted.safetensors in the output folder")


@dataclass
class GradientsConfig:
    """``conf/gradients.yaml``."""

    lesson: str = key("the lesson on second-order gradients to run, or all of them", choices=("all", *LESSONS))


@dataclass
class VerifyRunConfig:
    """Where the engines are tried, and in which numbers."""

    seed: int = key("of parameters, images and dropout", at_least=0, at_most=LARGEST_SEED)
    device: str = key("auto: the GPU if there is one; or cpu, cuda, cuda:N")
    dtype: str = key("float64 proves formulas; float32 shows rounding as well", choices=("float64", "float32"))


@dataclass
class VerifyCasesConfig:
    """What the engines are tried on."""

    steps: list[int] = key("numbers of inner steps K", at_least=1)


@dataclass
class VerifyConfig:
    """``conf/verify.yaml``."""

    run: VerifyRunConfig = field(default_factory=VerifyRunConfig)
    verify: VerifyCasesConfig = field(default_factory=VerifyCasesConfig)


@dataclass
class CompareSettings:
    """What is compared, and how."""

    variants: list[str] = key("what to compare, each a list of overrides with spaces between them")
    seeds: list[int] = key("values of run.seed; every variant is trained with each", at_least=0, at_most=LARGEST_SEED)
    jobs: int | None = key("runs at a time on this machine; null: one per core, or one on a GPU", at_least=1)
    target_accuracy: float | None = key(
        "validation accuracy whose time is reported, as a fraction; null: the highest that all runs reach",
        above=0,
        at_most=1,
    )
    steps: list[int] = key("numbers K of inner steps at which every engine is measured, beside inner.steps", at_least=1)
    rounds: int = key("times that every engine is timed, in turns", at_least=2)
    limit_mib: float = key("MiB at which a measurement of memory is stopped", above=0)
    resume: bool = key("go on with an unfinished comparison of the same configuration; false: start another")


@dataclass
class CompareConfig(TrainConfig):
    """``conf/compare.yaml``: the configuration that all variants share."""

    compare: CompareSettings = field(default_factory=CompareSettings)


@dataclass
class ReproduceConfig:
    """``conf/reproduce.yaml``."""

    row: str = key("the experiment to reproduce, a file in conf/experiment/")
    orders: list[str] = key("second: MAML; first: its first-order approximation", choices=("second", "first"))
    seeds: list[int] = key("values of run.seed; each order is trained with each", at_least=0, at_most=LARGEST_SEED)
    minutes: float | None = key(
        "when to stop; the same command goes on; null: when all is finished", above=0, at_most=1e6
    )
    jobs: int = key("runs at a time on this machine", at_least=1)
    overrides: list[str] = key("more keys of scripts/train.py, for every run", may_be_empty=True)
    record: bool = key("also write the figures to outputs/reference/omniglot.json and the README's table")
