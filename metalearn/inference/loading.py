"""Load the best checkpoint of a training, or a shipped model, as a ``Learner``."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from metalearn.config.options import CustomDataConfig
from metalearn.config.run_config import load_trusted_config
from metalearn.config.schema import TrainConfig
from metalearn.config.target import import_targets
from metalearn.core.errors import ConfigError
from metalearn.core.module_parts import module_parts
from metalearn.core.types import Episodes
from metalearn.inference.inputs import example_shape
from metalearn.inference.learner import Learner
from metalearn.pretrained.model_file import find_run, read_card
from metalearn.training.checkpoints import load_best
from metalearn.training.evaluation import collect_norm_statistics
from metalearn.training.experiment import (
    build_algorithm,
    build_metric,
    build_model,
    build_samplers,
    functionalize_model,
    resolve_device,
)
from metalearn.training.state import preserve_rng_state, seed_all


def load(run_dir: str | Path, device: str = "auto", *, trust_code: bool = False) -> Learner:
    """Load a trained model, ready to adapt; its data set is not needed.

    Args:
        run_dir: the folder of a finished or running training, with its ``config.yaml`` and ``checkpoints/``; a file of
            ``Learner.export``; or the name of a shipped model: ``omniglot-5w1s``, ``omniglot-5w5s``, ``omniglot-20w1s``
            or ``omniglot-20w5s``. A run that exists under this path counts more than a name.
        device: ``auto`` (the GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        trust_code: whether to run the user's own code that ``config.yaml`` names (``model=custom`` and its kind), if
            any. Data of ``data=custom`` are made again, for the shape of an example.

    Raises:
        RunError: if there is no such model, or it is missing a checkpoint or damaged.
        ConfigError: if its configuration cannot be read or names code without ``trust_code``, or the device is missing.
    """
    source = find_run(run_dir)
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", device):
        raise ConfigError(f"device={device}: must be auto, cpu, cuda or cuda:N")
    config = load_trusted_config(source, trust_code=trust_code, how="metalearn.load(run, trust_code=True)")
    torch_device = resolve_device(device)
    with preserve_rng_state():  # the caller's
        import_targets(config.targets())
        task = _example_task(config, torch_device)
        shape = task.query_x.shape[2:]
        outputs = task.query_y.shape[-1] if config.data.is_regression else config.task.ways
        seed_all(config.run.seed)  # as in training: a model may draw more than its parameters
        module = build_model(config, shape, outputs).to(torch_device)
        forward, params = functionalize_model(config, module)
        algorithm = build_algorithm(config, module)
        like = algorithm.init(params)
        if algorithm.tracks_norm_statistics:
            inner = algorithm.eval_inner(config.inner.steps)
            like |= collect_norm_statistics(forward, like, task, inner, loss=build_metric(config).loss)
    best = load_best(source, like=like, device=torch_device)
    head = module_parts(module).head
    return Learner(
        *(source, config, torch_device, forward, best.params, algorithm, head),
        *(best.iteration, best.validation_score, shape, outputs, read_card(source, best.iteration)),
    )


def _example_task(config: TrainConfig, device: torch.device) -> Episodes:
    """Return a task of the shape of the run's: zeros, or the first one of a user's own data."""
    if isinstance(config.data, CustomDataConfig):
        return build_samplers(config, device)[0].tasks(0, 1)
    ways = config.task.ways
    x = torch.zeros(1, ways, *example_shape(config.data), device=device)
    y = torch.zeros(1, ways, 1, device=device) if config.data.is_regression else torch.arange(ways, device=device)[None]
    return Episodes(x, y, x, y)
