"""Save tasks whose numbers are not finite, locate the gradient at fault, and explain out-of-memory errors.

An episode with a non-finite loss or gradient is saved, to be replayed, in a debugger if you like:

from metalearn.training.failures import replay_episode
replay_episode("RUN_FOLDER/nonfinite/meta-step-00000123.pt")      # raises the same error
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from metalearn.config.run_config import check_trusted, parse_run_config, to_yaml
from metalearn.config.schema import TrainConfig
from metalearn.config.target import import_targets
from metalearn.core import serialization as files
from metalearn.core.errors import (
    NonFiniteError,
    NonFiniteGradientError,
    RemoteNonFiniteError,
    RunError,
    is_out_of_memory,
)
from metalearn.core.profiling.memory import MIB
from metalearn.core.types import Episodes, MetaGradient, Params
from metalearn.derivatives import available_memory
from metalearn.inner import InnerLoop
from metalearn.training.auto_engine import MetaStepProblem, estimate_peak, first_meta_step
from metalearn.training.experiment import Experiment, build_algorithm, build_metric, build_model, functionalize_model
from metalearn.training.state import TrainState, preserve_rng_state, seed_all

log = logging.getLogger(__name__)

FOLDER = "nonfinite"
MAX_DUMPS = 20
"""Episodes saved in a run's folder; later ones are only logged."""


class DivergedError(RunError):
    """A training whose losses, gradients or parameters are no longer finite."""

    def __init__(self, reason: str, config: TrainConfig, meta_step: int) -> None:
        skip = "" if config.run.on_nonfinite == "skip" else "; run.on_nonfinite=skip passes such meta-steps by"
        super().__init__(
            f"Training has diverged at meta-step {meta_step}: {reason} Try a smaller inner.lr (now {config.inner.lr}) "
            f"or outer.lr ({config.outer.lr}), or outer.clip_norm=10 (now {config.outer.clip_norm or 'null'}){skip}. "
            "A run with changed keys can start from this one's best parameters, once it has validated: "
            "run.init_from=RUN_FOLDER."
        )


def locate_nonfinite_gradient(
    experiment: Experiment, state: TrainState, episodes: Episodes, grads: Params, *, single_process: bool
) -> NonFiniteError:
    """Find where a meta-gradient of finite losses is not finite, by computing it again.

    ``single_process`` says that no other process's tasks may be the cause.
    """
    norms = {name: g.norm() for name, g in grads.items()}
    name = next((n for n, norm in norms.items() if not torch.isfinite(norm)), None)
    if name is None and not single_process:
        return RemoteNonFiniteError()
    try:
        experiment.meta_gradient_eager(state.params, episodes, state.iteration)
    except NonFiniteError as error:  # possibly a loss that another library's gradient did not check
        return error
    name = name or max(norms, key=lambda n: float(norms[n]))  # each norm is finite, but not their sum of squares
    return NonFiniteGradientError(name, value=grads[name].norm().item())


def dump_episode(
    error: NonFiniteError, episodes: Episodes, state: TrainState, *, first: int, config: TrainConfig, run_dir: Path
) -> Path | None:
    """Save a task with the parameters at which it was not finite, and return the file.

    Returns ``None`` if the task is not known in this process, whose first task is number ``first`` of the batch, or if
    ``MAX_DUMPS`` are saved already.
    """
    folder = run_dir / FOLDER
    path = folder / f"meta-step-{state.iteration + 1:08}.pt"
    is_full = not path.exists() and len(list(folder.glob("*.pt"))) >= MAX_DUMPS
    if error.task is None or is_full:
        return None
    content = {
        "error": str(error),
        "iteration": state.iteration,
        "task_of_stream": state.iteration * config.task.meta_batch + error.task,
        "params": {name: p.detach() for name, p in state.params.items()},
        "episode": dict(vars(episodes.split(1)[error.task - first])),
        "config": to_yaml(config),
    }
    files.save_checked(content, path)
    return path


def replay_episode(path: Path | str, *, trust_code: bool = False) -> MetaGradient:
    """Compute a saved episode's meta-gradient again, on a CPU; its task is number 0.

    Args:
        path: of the file.
        trust_code: whether to run the user's own code that its configuration names, if any.

    Raises:
        ConfigError: if it names code, and ``trust_code`` is false.
        FileNotFoundError: if there is no such file.
        RunError: if it is damaged, or not a saved episode.
        NonFiniteError: as in the run, if a CPU computes the same.
    """
    content = files.load_checked(Path(path))
    if not isinstance(content, dict) or "episode" not in content:
        raise RunError(f"{path} is not a saved episode; those are in a run's {FOLDER}/.")
    config = parse_run_config(content["config"], Path(path))
    check_trusted(config, path, trust_code=trust_code, how="replay_episode(path, trust_code=True)")
    episode = Episodes(**content["episode"])
    outputs = episode.query_y.shape[-1] if config.data.is_regression else config.task.ways
    with preserve_rng_state():  # the caller's
        import_targets(config.targets())
        seed_all(config.run.seed)  # as in training: a model may draw more than its parameters
        module = build_model(config, episode.support_x.shape[2:], outputs)
    forward, _ = functionalize_model(config, module)
    algorithm, progress = build_algorithm(config, module), content["iteration"] / config.outer.iterations
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.run.precision == "bfloat16"):
        return algorithm.meta_gradient(
            forward, content["params"], episode, loss=build_metric(config).loss, progress=progress
        )


def explain_out_of_memory(error: BaseException, experiment: Experiment, *, processes: int = 1) -> RunError:
    """Return an error with a meta-step's memory and the keys that lower it, in the place of torch's out-of-memory one.

    Measuring takes memory itself: save first what must not be lost.
    """
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    try:
        return RunError(_out_of_memory_message(experiment, reason, processes))
    except Exception:  # of any kind, as it must not hide the first
        log.debug("The memory of a meta-step could not be measured", exc_info=True)
        keys = "inner.engine=adjoint, inner.task_chunk=1"
        return RunError(f"Out of memory ({reason}). The same gradient takes less with {keys}, or inner.engine=auto.")


def _out_of_memory_message(experiment: Experiment, reason: str, processes: int) -> str:
    config, inner = experiment.config, experiment.algorithm.peak_memory_inner
    local_tasks = math.ceil(config.task.meta_batch / processes)
    problem = first_meta_step(experiment)
    problem = replace(problem, episodes=problem.episodes.split(local_tasks)[0])
    chunk = problem.tasks_per_pass(inner)
    mib = _estimate_mib(problem, inner, chunk)
    needs = f" A meta-step takes about {mib:.0f} MiB as it is set" if mib else " As it is set, a meta-step does not fit"
    lines = [
        f"Out of memory ({reason}).{needs} (inner.engine={config.inner.engine}, {chunk} of {local_tasks} "
        f"tasks at a time), and {available_memory(experiment.device) / MIB:.0f} MiB are free now. "
        "The same gradient takes less by these keys:"
    ]
    adjoint = replace(inner, engine="adjoint")
    for keys, thriftier, tasks in (
        ("inner.engine=adjoint", adjoint, chunk),
        ("inner.task_chunk=1", inner, 1),
        ("inner.engine=adjoint inner.task_chunk=1", adjoint, 1),
    ):
        if (thriftier.engine, tasks) != (inner.engine, chunk):
            mib = _estimate_mib(problem, thriftier, tasks)
            lines.append(f"  {keys}" + (f"   about {mib:.0f} MiB" if mib else ""))
    if experiment.uses_cuda_graph:
        lines.append("  run.cuda_graph=false   a graph keeps the memory of a meta-step between meta-steps")
    lines += [
        "  inner.engine=auto   measures, and takes the fastest that fits",
        "  inner.checkpoint_every=s   near the square root of inner.steps, where those are many",
        "Smaller tasks take less as well (task.ways, task.shots, task.queries), and so does a narrower model.",
    ]
    return "\n".join(lines)


def _estimate_mib(problem: MetaStepProblem, inner: InnerLoop, tasks: int) -> float | None:
    """Return MiB of a meta-step by peak(c) = a + b c from passes of one and two tasks; ``None`` if these do not fit."""
    try:
        one = estimate_peak(problem, inner, 1)
        if tasks == 1:
            return one / MIB
        return (one + (tasks - 1) * (estimate_peak(problem, inner, 2) - one)) / MIB
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
