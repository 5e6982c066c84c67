"""Every configuration key: its type, what it means, and what is allowed. Imports neither torch nor Hydra.

Defaults are not here but in ``conf/``: a default lives in one place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING

from metalearn.data.catalog import DRAWINGS, GLYPH_SHARES, OMNIGLOT_SPLITS, dataset_in_use, glyph_splits
from metalearn.errors import ConfigError, DataError

ENGINES = ("unroll",)
"""Names for ``inner.engine``; a test holds them equal to ``metalearn.metagrad.ENGINES``, which needs torch."""


def key(
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A configuration key without a default, with what ``--help`` says of it and the range that is checked."""
    limits = {"at_least": at_least, "above": above, "choices": choices}
    return field(default=MISSING, metadata={"meaning": meaning, **limits})


@dataclass
class TaskConfig:
    ways: int = key("N, classes per task", at_least=2)
    shots: int = key("K, support examples per class", at_least=1)
    queries: int = key("query examples per class", at_least=1)
    meta_batch: int = key("T, tasks per meta-step", at_least=1)


@dataclass
class InnerConfig:
    lr: float = key("step size of the inner gradient descent", above=0)
    steps: int = key("inner steps in training", at_least=0)
    eval_steps: int = key("inner steps in validation and test; may differ from inner.steps", at_least=0)
    second_order: bool = key("differentiate through the inner gradients (MAML); false: first-order MAML")
    engine: str = key("how the meta-gradient is computed", choices=ENGINES)
    task_chunk: int | None = key("tasks per pass, to save memory; null: all at once", at_least=1)


@dataclass
class OuterConfig:
    lr: float = key("Adam's learning rate", above=0)
    iterations: int = key("meta-steps", at_least=1)
    schedule: str = key("learning rate over the run; cosine falls to 0", choices=("constant", "cosine"))
    clip_norm: float | None = key("largest global norm of the meta-gradient; null: not clipped", above=0)


@dataclass
class EvalConfig:
    every: int = key("meta-steps between validations", at_least=1)
    validation_episodes: int = key("tasks of validation classes in each validation", at_least=2)
    episodes: int = key("tasks of test classes in the final test", at_least=2)


@dataclass
class DataConfig:
    name: str = key("the data set", choices=("omniglot", "glyphs"))

    def smallest_split(self) -> tuple[int, str]:
        """Classes in the smallest split, and its description."""
        raise NotImplementedError


@dataclass
class OmniglotConfig(DataConfig):
    root: str | None = key("folder that holds omniglot-py/; null: the user's cache, filled by download")
    fallback: str | None = key("what to train on where Omniglot cannot be had; null: stop", choices=("glyphs",))
    split: str = key("classic: 1100/100/423 random classes; alphabets: whole ones", choices=tuple(OMNIGLOT_SPLITS))
    rotations: bool = key("rotate training classes by multiples of 90 degrees into new ones")

    def smallest_split(self) -> tuple[int, str]:
        return OMNIGLOT_SPLITS[self.split].smallest, f"of Omniglot's {self.split} split"


@dataclass
class GlyphsConfig(DataConfig):
    classes: int = key("characters to invent: 70% to train on, 10% validation, 20% test", at_least=20)
    jitter: float = key("how differently one character is drawn, as a fraction of the image's width", at_least=0)
    seed: int = key("of the characters and drawings", at_least=0)

    def smallest_split(self) -> tuple[int, str]:
        return glyph_splits(self.classes).smallest, f"of {self.classes} glyphs ({GLYPH_SHARES[1]:.0%} validate)"


@dataclass
class ModelConfig:
    name: str = key("the network", choices=("conv4", "mlp"))


@dataclass
class Conv4Config(ModelConfig):
    width: int = key("filters of every convolution", at_least=1)
    pool: str = key("stride: stride-2 convolutions (Finn); max: max-pooling (Vinyals)", choices=("stride", "max"))


@dataclass
class MLPConfig(ModelConfig):
    hidden: list[int] = key("width of each hidden layer", at_least=1)
    batch_norm: bool = key("BatchNorm before each ReLU")


@dataclass
class AlgorithmConfig:
    name: str = key("the meta-learner", choices=("maml",))


@dataclass
class RunConfig:
    seed: int = key("of the initial parameters and of every task", at_least=0)
    device: str = key("auto: the GPU if there is one; or cpu, cuda, cuda:N")
    deterministic: bool = key("refuse operations that are not reproducible bit by bit")


@dataclass
class LogConfig:
    every: int = key("meta-steps between points in TensorBoard", at_least=1)
    images: bool = key("a grid of support and query images with predictions, at each validation")


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


@dataclass
class BenchConfig:
    rounds: int = key("times that every contender is timed, in turns", at_least=2)


@dataclass
class BenchmarkConfig(TrainConfig):
    """``conf/benchmark.yaml``: a training's configuration, of which one meta-step is timed."""

    bench: BenchConfig = field(default_factory=BenchConfig)


@dataclass
class EvaluatedRunConfig:
    dir: str = key("folder of the run to test")
    device: str | None = key("null: as the run was trained; or auto, cpu, cuda, cuda:N")


@dataclass
class EvaluatedEvalConfig:
    episodes: int | None = key("tasks of test classes; null: as the run says", at_least=2)


@dataclass
class EvaluateConfig:
    """``conf/evaluate.yaml``."""

    run: EvaluatedRunConfig = field(default_factory=EvaluatedRunConfig)
    eval: EvaluatedEvalConfig = field(default_factory=EvaluatedEvalConfig)


def is_group(value: object) -> bool:
    return dataclasses.is_dataclass(value)


def entries(config: object, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any], Any]]:
    """Every leaf key below a configuration object: full name, value, field and type."""
    assert dataclasses.is_dataclass(config)
    types = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if is_group(value):
            yield from entries(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f, types[f.name]


_IN_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[int]: "whole numbers",
}


def allowed(f: dataclasses.Field[Any], kind: Any) -> str:
    """What a key may hold, in words."""
    limits = f.metadata
    if limits["choices"]:
        words = "one of " + ", ".join(limits["choices"]) if len(limits["choices"]) > 1 else limits["choices"][0]
    else:
        words = next(words for base, words in _IN_WORDS.items() if kind in (base, base | None))
        if limits["at_least"] is not None:
            words += f", at least {limits['at_least']:g}"
        if limits["above"] is not None:
            words += f" above {limits['above']:g}"
    return words + (" or null" if kind in (str | None, int | None, float | None) else "")


def _in_range(value: Any, limits: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, list):
        return len(value) > 0 and all(_in_range(v, limits) for v in value)
    if limits["choices"] is not None:
        return value in limits["choices"]
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if limits["at_least"] is not None and value < limits["at_least"]:
        return False
    return limits["above"] is None or value > limits["above"]


def _faults(config: object) -> list[str]:
    return [
        f"{name}={'null' if value is None else value}: must be {allowed(f, kind)} ({f.metadata['meaning']})"
        for name, value, f, kind in entries(config)
        if not _in_range(value, f.metadata)
    ]


def check(config: TrainConfig) -> None:
    """Refuse a configuration that cannot be run, before anything is loaded.

    Raises:
        ConfigError: listing every value that is out of range, or that does not fit another.
    """
    faults = _faults(config)
    if not faults:
        classes, where = config.data.smallest_split()
        if config.task.ways > classes:
            faults.append(f"task.ways={config.task.ways}: at most {classes}, the smallest part {where}")
        if (each := config.task.shots + config.task.queries) > DRAWINGS:
            faults.append(
                f"task.shots={config.task.shots} and task.queries={config.task.queries}: together {each}, and a class "
                f"has {DRAWINGS} drawings; choose at most {DRAWINGS} in all"
            )
        faults += _device_faults(config.run.device)
    if not faults and isinstance(config.data, OmniglotConfig):
        try:
            dataset_in_use(config.data.name, config.data.root, config.data.fallback)
        except DataError as error:
            faults.append(str(error))
    _refuse(faults)


def check_evaluate(config: EvaluateConfig) -> None:
    """As ``check``, for ``conf/evaluate.yaml``."""
    faults = _faults(config) + (_device_faults(config.run.device) if config.run.device else [])
    folder = Path(config.run.dir)
    if not (folder / "config.yaml").is_file():
        faults.append(f"run.dir={config.run.dir}: not a run's folder, as it holds no config.yaml")
    _refuse(faults)


def _device_faults(device: str) -> list[str]:
    kind, _, number = device.partition(":")
    if device == "auto" or (kind in ("cpu", "cuda") and (not number or (kind == "cuda" and number.isdigit()))):
        return []
    return [f"run.device={device}: must be auto, cpu, cuda or cuda:N"]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))
