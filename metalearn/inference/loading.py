"""Load the best checkpoint of a training as a ``Learner``."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from metalearn.algorithms import Algorithm
from metalearn.config.run_config import load_run_config
from metalearn.config.schema import SinusoidConfig, TrainConfig
from metalearn.core.errors import ConfigError, RunError
from metalearn.core.functional import functionalize
from metalearn.core.module_parts import module_parts
from metalearn.core.types import Episodes, Forward, Params
from metalearn.inference.inputs import example_shape
from metalearn.inference.learner import Learner
from metalearn.training.checkpoints import load_best
from metalearn.training.evaluation import collect_norm_statistics
from metalearn.training.experiment import build_algorithm, build_metric, build_model, resolve_device


def load(run_dir: str | Path, device: str = "auto") -> Learner:
    """Load the best checkpoint of a finished or running training, ready to adapt; its data set is not needed.

    Args:
        run_dir: the run's folder, with its ``config.yaml`` and ``checkpoints/``.
        device: ``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        RunError: if this is not a run's folder, or its checkpoint is missing or damaged.
        ConfigError: if its configuration cannot be read, or the device does not exist.
    """
    folder = Path(run_dir).expanduser()
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"{folder}: not a run's folder, as it holds no config.yaml; name one that training has made.")
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", device):
        raise ConfigError(f"device={device}: must be auto, cpu, cuda or cuda:N")
    config, torch_device = load_run_config(path), resolve_device(device)
    with torch.random.fork_rng(devices=[]):  # do not advance the caller's random numbers
        module = build_model(config, example_shape(config.data)).to(torch_device)
    forward, params = functionalize(module)
    algorithm = build_algorithm(config, module)
    like = {**algorithm.init(params), **_norm_statistics_like(config, algorithm, forward, params)}
    best = load_best(folder, like=like, device=torch_device)
    head = module_parts(module).head
    return Learner(folder, config, torch_device, forward, best.params, algorithm, head, best.iteration)


def _norm_statistics_like(config: TrainConfig, algorithm: Algorithm, forward: Forward, params: Params) -> Params:
    """Return placeholders with the names and shapes of the BatchNorm statistics in the run's checkpoints."""
    if not algorithm.tracks_norm_statistics:
        return {}
    device, ways, score = next(iter(params.values())).device, config.task.ways, build_metric(config)
    x = torch.zeros(1, ways, *example_shape(config.data), device=device)
    is_regression = isinstance(config.data, SinusoidConfig)
    y = torch.zeros(1, ways, 1, device=device) if is_regression else torch.arange(ways, device=device)[None]
    tasks, inner = Episodes(x, y, x, y), algorithm.eval_inner(config.inner.steps)
    return collect_norm_statistics(forward, algorithm.init(params), tasks, inner, loss=score.loss)
