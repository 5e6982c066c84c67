"""Configurations of a training, composed and validated as the command line does it."""

from __future__ import annotations

from pathlib import Path

from metalearn.config import commands_schema, schema
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config

SCHEMAS: dict[str, type] = {
    "train": schema.TrainConfig,
    "adapt": commands_schema.AdaptConfig,
    "benchmark": commands_schema.BenchmarkConfig,
    "compare": commands_schema.CompareConfig,
    "evaluate": commands_schema.EvaluateConfig,
    "gradients": commands_schema.GradientsConfig,
    "reproduce": commands_schema.ReproduceConfig,
    "verify": commands_schema.VerifyConfig,
}
"""The schema of every primary file in ``conf/``."""


def train_config(*overrides: str, config_dir: Path | None = None) -> TrainConfig:
    place = str(config_dir) if config_dir else None
    config = to_dataclass(compose("train", overrides, place), TrainConfig, overrides, place)
    validate_train_config(config)
    return config


def write_experiment(folder: Path, text: str | bytes) -> None:
    """Write ``experiment/mine.yaml`` below a folder."""
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
