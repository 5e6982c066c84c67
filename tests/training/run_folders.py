"""Make run folders for tests: trained a little, interrupted, or with a checkpoint of untrained parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn.config.run_config import resolve_data, resolve_resume, to_yaml
from metalearn.core import serialization as files
from metalearn.core.types import Episodes
from metalearn.training import loop
from metalearn.training.checkpoints import best_path, save_best
from metalearn.training.experiment import Experiment, build_experiment
from metalearn.training.runtime.distributed import DistributedContext
from metalearn.training.state import BestCheckpoint
from metalearn.training.step import local_tasks
from metalearn.training.trainer import train
from tests.config.factories import train_config
from tests.faults.runs import SMALL as MLP_RUN

AT_VALIDATIONS = [*MLP_RUN, "run.checkpoint_every_s=null"]
SMALL = ["data=glyphs", "data.classes=50", "model.width=8", "task.meta_batch=4"]
SINUSOID = ["experiment=sinusoid", "model.hidden=[8]", "task.meta_batch=4"]


class PowerCut(BaseException):
    """The end of a process that can do nothing more; no code but a test's catches it."""


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train, or resume with ``run.resume``, as ``scripts/train.py`` does; return ``metrics.json``."""
    train(resolve_resume(resolve_data(train_config(*overrides)), folder), folder)
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def run_interrupted(folder: Path, iteration: int, *overrides: str) -> None:
    """Train until the power goes, before the meta-step that follows ``iteration`` others."""

    def fail(experiment: Experiment, at: int, ranks: DistributedContext) -> Episodes:
        if at == iteration:
            raise PowerCut
        return local_tasks(experiment, at, ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "local_tasks", fail)
        with pytest.raises(PowerCut):
            run(folder, *overrides)
    assert not (folder / "metrics.json").exists()


def trained(folder: Path, *overrides: str) -> Path:
    """Train for two meta-steps; return the folder."""
    few = ["outer.iterations=2", "eval.every=2", "eval.validation_episodes=4", "eval.episodes=4"]
    run(folder, *SMALL, *few, *overrides)
    return folder


def untrained(folder: Path, *overrides: str, base: list[str] = SMALL) -> Path:
    """Make the folder of a run whose best parameters are its initial ones, changed at random."""
    config = train_config(*base, *overrides)
    folder.mkdir(parents=True)
    files.atomic_write_text(folder / "config.yaml", to_yaml(config))
    theta = build_experiment(config).theta
    generator = torch.Generator().manual_seed(1)
    moved = {name: p * (1 + 0.1 * torch.rand(p.shape, generator=generator)) for name, p in theta.items()}
    save_best(BestCheckpoint(7, 0.5, moved), folder, to_yaml(config))
    return folder


def replace_config(run_dir: Path, text: str) -> None:
    """Give a run another configuration, as if it had been trained with it."""
    (run_dir / "config.yaml").write_text(text)
    content = files.load_checked(best_path(run_dir))
    files.save_checked({**content, "config": text}, best_path(run_dir))
