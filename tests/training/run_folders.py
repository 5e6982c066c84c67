"""Runs' folders for tests: trained a little, or with a checkpoint of parameters that were never trained."""

from __future__ import annotations

from pathlib import Path

import torch

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import resolve_data, to_yaml
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core import serialization as files
from metalearn.training.checkpoints import save_best
from metalearn.training.experiment import build_experiment
from metalearn.training.state import BestCheckpoint
from metalearn.training.trainer import train

SMALL = ["data=glyphs", "data.classes=50", "model.width=8", "task.meta_batch=4"]
SINUSOID = ["experiment=sinusoid", "model.hidden=[8]", "task.meta_batch=4"]


def trained(folder: Path, *overrides: str) -> Path:
    """Trained for two meta-steps."""
    few = ["outer.iterations=2", "eval.every=2", "eval.validation_episodes=4", "eval.episodes=4"]
    train(resolve_data(_config(*SMALL, *few, *overrides)), folder)
    return folder


def untrained(folder: Path, *overrides: str, base: list[str] = SMALL) -> Path:
    """As a training would leave it that changed its first parameters at random."""
    config = _config(*base, *overrides)
    folder.mkdir(parents=True)
    files.atomic_write_text(folder / "config.yaml", to_yaml(config))
    theta = build_experiment(config).theta
    generator = torch.Generator().manual_seed(1)
    moved = {name: p * (1 + 0.1 * torch.rand(p.shape, generator=generator)) for name, p in theta.items()}
    save_best(BestCheckpoint(7, 0.5, moved), folder)
    return folder


def _config(*overrides: str) -> TrainConfig:
    config = to_dataclass(compose("train", overrides), TrainConfig)
    validate_train_config(config)
    return config
