"""The eight commands, each a function of its configuration and an output folder; add another here.

``metalearn train`` and ``python scripts/train.py`` are the same function. A new command is a function and a line of
``COMMANDS`` here, a schema in ``config/commands_schema.py``, and defaults in ``conf/``. What needs torch is imported
inside of the functions, so that a wrong key is reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import shutil
import sys
from pathlib import Path

import metalearn
from metalearn.commands.adapt.checks import check_adapt
from metalearn.commands.benchmark.settings import check_benchmark
from metalearn.commands.cli import command
from metalearn.commands.compare.variants import check_compare
from metalearn.commands.output_folders import run_dir_errors
from metalearn.commands.reproduce.plan import check_reproduce
from metalearn.commands.shell import exit_when_stdout_closes
from metalearn.commands.verify.checks import check_verify
from metalearn.config.commands_schema import (
    AdaptConfig,
    BenchmarkConfig,
    CompareConfig,
    EvaluateConfig,
    GradientsConfig,
    ReproduceConfig,
    VerifyConfig,
)
from metalearn.config.run_config import (
    load_trusted_config,
    relocate_data,
    resolve_data,
    resolve_resume,
)
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.core.text import fit, wrap
from metalearn.pretrained.model_file import find_run


def train_worker(config: TrainConfig) -> None:
    """Run as a process of torchrun other than the main one."""
    from metalearn.training.trainer import train_worker

    train_worker(resolve_data(config))


@command(
    "train",
    TrainConfig,
    validate_train_config,
    may_continue=lambda config: config.run.resume is not False,
    follow=train_worker,
)
def train(config: TrainConfig, run_dir: Path) -> None:
    """Train MAML on few-shot tasks, validate while training, and test the best checkpoint once.

    inner.second_order=true differentiates through the inner update (MAML); false does not (first-order MAML).
    """
    resolved = resolve_resume(resolve_data(config), run_dir)
    from metalearn.commands.after_training import print_next_steps
    from metalearn.training.trainer import train

    train(resolved, run_dir)
    print_next_steps(resolved, run_dir)


def check_evaluate(config: EvaluateConfig) -> None:
    """Check that ``run.dir`` is a run, and that code that it names is trusted."""
    if errors := run_dir_errors(config.run.dir):
        raise ConfigError("\n".join(errors))
    load_trusted_config(config.run.dir, trust_code=config.run.trust_code)


@command("evaluate", EvaluateConfig, check_evaluate)
def evaluate(config: EvaluateConfig, output_dir: Path) -> None:
    """Test the best checkpoint of a run again, on the tasks of test classes that the run itself was tested on."""
    run = find_run(config.run.dir)
    trained = load_trusted_config(run, trust_code=config.run.trust_code)
    wanted = dataclasses.replace(
        trained,
        data=relocate_data(trained.data, config.data.root, rotate_test=config.data.rotate_test),
        run=dataclasses.replace(trained.run, device=config.run.device or trained.run.device),
        eval=dataclasses.replace(
            trained.eval,
            episodes=config.eval.episodes or trained.eval.episodes,
            queries=config.eval.queries or trained.eval.queries,
        ),
    )
    validate_train_config(wanted, trains=False)
    from metalearn.training.evaluate_run import evaluate_run

    evaluate_run(wanted, run, output_dir)


@command("compare", CompareConfig, check_compare, may_continue=lambda config: True)
def compare(config: CompareConfig, folder: Path) -> None:
    """Train every variant with every seed on the same tasks, and report accuracy, memory and time side by side.

    The same command resumes a comparison that was interrupted. The exit code is 1 if a run failed; the report says
    why, and the others are not affected.
    """
    from metalearn.commands.compare.run import run_comparison

    if not run_comparison(config, folder):
        sys.exit(1)


@command("gradients", GradientsConfig)
def gradients(config: GradientsConfig, output_dir: Path) -> None:
    """Run the lessons on second-order gradients, and check every number against its analytic value.

    The exit code is 1 if one of them is wrong. Plots, TensorBoard events and lessons.json lie in the output folder.
    """
    from metalearn.commands.gradients import run_lessons

    if not run_lessons(config, output_dir):
        sys.exit(1)


@command("verify", VerifyConfig, check_verify)
def verify(config: VerifyConfig, output_dir: Path) -> None:
    """Check every engine on this machine: against unroll, finite differences, learn2learn, higher and TorchOpt.

    model=custom model.target=MODULE:NAME adds your own network, and inner.optimizer=custom your own update rule. The
    exit code is 1 if a comparison exceeds its bound. All of them lie in verify.json in the output folder.
    """
    from metalearn.commands.verify.run import run_verification

    if not run_verification(config, output_dir):
        sys.exit(1)


@command("benchmark", BenchmarkConfig, check_benchmark)
def benchmark(config: BenchmarkConfig, output_dir: Path) -> None:
    """Time one meta-step beside learn2learn, higher, TorchOpt and a hand-written loop; all must give the same gradient.

    bench.setting=configured takes the meta-step of a training's configuration instead of the published settings.
    bench.kind=engines measures memory and time of every engine against the number of inner steps, bench.kind=float32
    how far meta-gradients are from float64, bench.kind=sweeps how cost grows with inner steps, tasks, ways and width.
    """
    if config.bench.kind == "engines":
        from metalearn.commands.benchmark.engines import run_engine_table

        run_engine_table(config, output_dir)
    elif config.bench.kind == "float32":
        from metalearn.commands.benchmark.float32 import run_float32_table

        run_float32_table(resolve_data(config), output_dir)
    elif config.bench.kind == "sweeps":
        from metalearn.commands.benchmark.sweeps import run_sweeps

        run_sweeps(config, output_dir)
    else:
        from metalearn.commands.benchmark.run import run_benchmark

        run_benchmark(resolve_data(config), output_dir)


@command("adapt", AdaptConfig, check_adapt)
def adapt(config: AdaptConfig, output_dir: Path) -> None:
    """Adapt the best checkpoint of a run to your own images, one folder a class, and predict others."""
    from metalearn.commands.adapt.run import run_adapt

    run_adapt(config, output_dir)


@command("reproduce", ReproduceConfig, check_reproduce, may_continue=lambda config: True)
def reproduce(config: ReproduceConfig, folder: Path) -> None:
    """Train an experiment in first and second order with several seeds, and compare it with the published accuracy.

    The same command resumes the runs that are not finished. The exit code is 0 when all are, 1 if a run failed, and 75
    if the time limit (time_limit_minutes=) was reached first. Results are written to omniglot.json; with
    update_reference=true also to outputs/reference/omniglot.json below the current folder, which is meant to be a
    checkout.
    """
    from metalearn.commands.reproduce.run import run_reproduction

    sys.exit(run_reproduction(config, folder))


COMMANDS = {
    function.__name__: function
    for function in (train, evaluate, compare, gradients, verify, benchmark, adapt, reproduce)
}


def main() -> None:
    """Run the command that the first argument names, with the arguments after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        COMMANDS[name]()
        return
    with exit_when_stdout_closes():
        if name in ("--help", "-h"):
            print(_usage())
        elif name == "--version":
            print(f"metalearn {metalearn.__version__}")
        else:
            near = "".join(f" Did you mean {match}?" for match in difflib.get_close_matches(name, COMMANDS, n=1))
            known = ", ".join(COMMANDS)
            message = f"metalearn {name}: there is no such command.{near} The commands are {known}."
            print(fit(message, sys.stderr), file=sys.stderr)
            sys.exit(2)


def _usage() -> str:
    width = shutil.get_terminal_size().columns
    lines = [
        line
        for name, function in COMMANDS.items()
        for line in wrap(
            (inspect.getdoc(function) or "").splitlines()[0], width, indent=" " * 13, first=f"  {name:<11}"
        )
    ]
    return "\n".join(
        [
            "usage: metalearn COMMAND [KEY=VALUE ...]",
            "       metalearn COMMAND --help",
            "       metalearn --version",
            "",
            *lines,
        ]
    )
