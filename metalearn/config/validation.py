"""Refusing a configuration that cannot be run, before anything is loaded. Imports neither torch nor Hydra."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from metalearn.config.commands_schema import EvaluateConfig, GradientsConfig, VerifyConfig
from metalearn.config.compatibility import algorithm_faults
from metalearn.config.faults_of_tasks import task_faults
from metalearn.config.output_names import COMPARISON_FILE
from metalearn.config.schema import DataConfig, ModelConfig, OmniglotConfig, TrainConfig
from metalearn.core.errors import ConfigError, DataError
from metalearn.data.metadata import resolve_dataset


def iter_fields(config: object, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any], Any]]:
    """Every leaf key below a configuration object: full name, value, field and type."""
    assert dataclasses.is_dataclass(config)
    types = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from iter_fields(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f, types[f.name]


_NOT_COMPARED = (
    *("run.resume", "run.checkpoint_seconds", "run.on_nonfinite", "run.cuda_graph"),
    "data.root",
)


def result_keys(config: object) -> dict[str, Any]:
    """Every leaf key and its value, but for those that change nothing in what was computed so far."""
    return {name: value for name, value, _, _ in iter_fields(config) if name not in _NOT_COMPARED}


_IN_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[int]: "one or more whole numbers",
    list[float]: "one or more numbers",
    list[str]: "one or more texts",
}


def describe_allowed(f: dataclasses.Field[Any], kind: Any) -> str:
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
        if limits["at_most"] is not None:
            words += f" and at most {limits['at_most']}"
    return words + (" or null" if kind in (str | None, int | None, float | None) else "")


def _in_range(value: Any, limits: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, list):
        return (len(value) > 0 or limits["may_be_empty"]) and all(_in_range(v, limits) for v in value)
    if limits["choices"] is not None:
        return (str(value).lower() if isinstance(value, bool) else value) in limits["choices"]
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if limits["at_least"] is not None and value < limits["at_least"]:
        return False
    if limits["at_most"] is not None and value > limits["at_most"]:
        return False
    return limits["above"] is None or value > limits["above"]


def _faults(config: object) -> list[str]:
    return [
        f"{name}={'null' if value is None else value}: must be {describe_allowed(f, kind)} ({f.metadata['meaning']})"
        for name, value, f, kind in iter_fields(config)
        if not _in_range(value, f.metadata)
    ]


def validate_train_config(config: TrainConfig, *, trains: bool = True) -> None:
    """Refuse a configuration that cannot be run, before anything is loaded.

    Args:
        config: a training's.
        trains: whether it is to be trained with; a model that a GPU trained in TF32 can be tested on a CPU.

    Raises:
        ConfigError: listing every value that is out of range, or that does not fit another.
    """
    faults = [
        f"{group}: nothing is chosen; take {' or '.join(f'{group}={option}' for option in options)}"
        for group, base, options in (
            ("data", DataConfig, ("omniglot", "glyphs", "images", "sinusoid")),
            ("model", ModelConfig, ("conv4", "mlp", "resnet12")),
        )
        if type(getattr(config, group)) is base
    ]
    _refuse(faults)
    faults = _faults(config) + _device_faults(config.run.device)
    if trains and config.run.device == "cpu" and (fault := tf32_error(config.run.precision, "a CPU")):
        faults.append(fault)
    if config.inner.engine == "auto" and config.run.deterministic:
        faults.append(
            "inner.engine=auto with run.deterministic=true: auto chooses by measured times, which differ from run to "
            "run; name an engine"
        )
    if config.run.memory_limit is not None and config.inner.engine != "auto":
        faults.append(
            f"run.memory_limit={config.run.memory_limit:g}: only inner.engine=auto heeds it; set that, or leave it out"
        )
    if config.inner.snapshot_every > 1 and config.inner.engine == "unroll":
        faults.append(
            f"inner.snapshot_every={config.inner.snapshot_every}: inner.engine=unroll keeps graphs and no snapshots; "
            "take checkpoint, adjoint or auto, or leave it"
        )
    faults += [] if faults else task_faults(config) + algorithm_faults(config)
    if not faults and isinstance(config.data, OmniglotConfig) and config.data.fallback is None:
        try:
            resolve_dataset(config.data.name, config.data.root, None)
        except DataError as error:
            faults.append(str(error))
    _refuse(faults)


def validate_evaluate_config(config: EvaluateConfig) -> None:
    """As ``validate_train_config``, for ``conf/evaluate.yaml``."""
    _refuse(_faults(config) + run_faults(config.run.dir, config.run.device))


def run_faults(folder: str, device: str | None) -> list[str]:
    """What is wrong with ``run.dir`` as a trained run's folder, and with ``run.device``."""
    faults = _device_faults(device) if device else []
    if not (Path(folder) / "config.yaml").is_file():
        kind = "a comparison's folder; name one of the runs in it" if _is_comparison(folder) else "not a run's folder"
        faults.append(f"run.dir={folder}: {kind}, as it holds no config.yaml")
    return faults


def _is_comparison(folder: str) -> bool:
    return (Path(folder) / COMPARISON_FILE).is_file()


def check_ranges(config: object) -> None:
    """Refuse values that are out of range, for a command whose other checks lie elsewhere.

    Raises:
        ConfigError: listing all of them.
    """
    _refuse(_faults(config))


def validate_gradients_config(config: GradientsConfig) -> None:
    """As ``validate_train_config``, for ``conf/gradients.yaml``."""
    _refuse(_faults(config))


def validate_verify_config(config: VerifyConfig) -> None:
    """As ``validate_train_config``, for ``conf/verify.yaml``."""
    _refuse(_faults(config) + _device_faults(config.run.device))


def tf32_error(precision: str, device: str) -> str | None:
    """What is wrong with this precision on a device that has no TF32; ``None`` if it is another precision."""
    if precision != "tf32":
        return None
    return (
        f"run.precision=tf32: TF32 is how NVIDIA GPUs since Ampere multiply, and run.device is {device}; take "
        "run.precision=float32 (or bfloat16), or such a GPU"
    )


def _device_faults(device: str) -> list[str]:
    if re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", device):
        return []
    return [f"run.device={device}: must be auto, cpu, cuda or cuda:N"]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))
