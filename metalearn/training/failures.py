"""A loss or a gradient that is not finite: which task and inner step it came from, and the episode put away for replay.

from metalearn.training.failures import replay
replay("RUN_FOLDER/nonfinite/meta-step-00000123.pt")      # raises the same error, in a debugger if you like
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from metalearn.config.run_config import parse_run_config, to_yaml
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import NonFiniteError, NonFiniteGradientError, RemoteNonFiniteError, RunError
from metalearn.core.functional import functionalize
from metalearn.core.types import Episodes, MetaGradient, Params
from metalearn.training.experiment import Experiment, build_algorithm, build_metric, build_model
from metalearn.training.state import TrainState

FOLDER = "nonfinite"
MAX_DUMPS = 20
"""Episodes in a run's folder; of later ones only the message is in the log."""


def locate_nonfinite_gradient(
    experiment: Experiment, state: TrainState, episodes: Episodes, grads: Params, *, alone: bool
) -> NonFiniteError:
    """The error that names where a gradient of finite losses is not finite, which is found by computing it again.

    Args:
        experiment: what was computed with.
        state: where.
        episodes: this process's tasks.
        grads: their mean meta-gradient.
        alone: whether there is no other process whose tasks may be at fault.
    """
    norms = {name: g.norm() for name, g in grads.items()}
    name = next((n for n, norm in norms.items() if not torch.isfinite(norm)), None)
    if name is None and not alone:
        return RemoteNonFiniteError()
    try:
        experiment.eager(state.params, episodes, state.iteration)
    except NonFiniteError as error:  # a loss too, if another library's gradient has not looked at it
        return error
    name = name or max(norms, key=lambda n: float(norms[n]))  # each is finite, and their sum of squares is not
    return NonFiniteGradientError(name, value=grads[name].norm().item())


def dump_episode(
    error: NonFiniteError,
    episodes: Episodes,
    params: Params,
    *,
    first: int,
    iteration: int,
    config: TrainConfig,
    run_dir: Path,
) -> Path | None:
    """Put the task away with the parameters that it was not finite at.

    Args:
        error: names the task of the batch.
        episodes: this process's tasks of the batch.
        params: before the meta-step.
        first: number of this process's first task in the batch.
        iteration: meta-steps taken before.
        config: the run's.
        run_dir: its folder.

    Returns:
        The file; ``None`` if the task is not known here, or if there are enough files already.
    """
    folder = run_dir / FOLDER
    path = folder / f"meta-step-{iteration + 1:08}.pt"
    full = not path.exists() and len(list(folder.glob("*.pt"))) >= MAX_DUMPS
    if error.task is None or full:
        return None
    episode = episodes.split(1)[error.task - first]
    content = {
        "error": str(error),
        "iteration": iteration,
        "task_of_stream": iteration * config.task.meta_batch + error.task,
        "params": {name: p.detach() for name, p in params.items()},
        "episode": {f.name: getattr(episode, f.name) for f in dataclasses.fields(episode)},
        "config": to_yaml(config),
    }
    files.save_checked(content, path)
    return path


def replay_episode(path: Path | str) -> MetaGradient:
    """Compute the meta-gradient again, on a CPU, of an episode that was put away; its task is number 0.

    Raises:
        FileNotFoundError: if there is no such file.
        RunError: if it is damaged, or no kept episode.
        NonFiniteError: as in the run, if a CPU computes the same.
    """
    content = files.load_checked(Path(path))
    if not isinstance(content, dict) or "episode" not in content:
        raise RunError(f"{path} is no episode that was put away; those lie in a run's {FOLDER}/.")
    config = parse_run_config(content["config"], Path(path))
    episode = Episodes(**content["episode"])
    module = build_model(config, episode.support_x.shape[2:])
    forward, _ = functionalize(module)
    algorithm, progress = build_algorithm(config, module), content["iteration"] / config.outer.iterations
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.run.precision == "bfloat16"):
        return algorithm.meta_gradient(
            forward, content["params"], episode, loss=build_metric(config).loss, progress=progress
        )
