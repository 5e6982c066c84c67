"""The ``@command`` decorator: parse the command line, validate, run a function, report errors.

    @command("train", TrainConfig, check)
    def train(config: TrainConfig, run_dir: Path) -> None: ...

composes ``conf/train.yaml`` with the command line, rejects invalid configurations before torch is imported, calls the
function once, or once a job under ``--multirun``, and prints errors that a user can fix without a stack trace.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from metalearn.commands.command_line import command_again, parse_flags, requested_jobs
from metalearn.commands.mistakes import find_mistakes
from metalearn.commands.output_folders import RUN_FILES
from metalearn.commands.shell import discard, exit_when_stdout_closes, invocation
from metalearn.config.compose import (
    CONF,
    Config,
    allow_new_options,
    compose,
    group_defaults,
    to_dataclass,
    user_conf_dir,
)
from metalearn.config.former_keys import rename_overrides
from metalearn.config.help import MAIN_KEYS, help_text
from metalearn.core.errors import OS_ERROR_HINTS, ConfigError, MetalearnError, RunError, TerminatedError
from metalearn.core.quoting import format_assignment, quote_command, quote_word
from metalearn.core.text import fit
from metalearn.training.run_folder import check_holds_files, check_is_no_link, check_no_run_in
from metalearn.training.runtime import torchrun
from metalearn.training.runtime.signals import signals_as_exceptions

_WIDEST_HELP = 100


def command(
    name: str,
    kind: type[Config],
    check: Callable[[Config], None] = lambda config: None,
    *,
    may_continue: Callable[[Config], bool] = lambda config: False,
    follow: Callable[[Config], None] | None = None,
) -> Callable[[Callable[[Config, Path], None]], Callable[[], None]]:
    """Make a function of a configuration and an output folder into a command.

    Args:
        name: name of the primary file in ``conf/``.
        kind: schema of the configuration.
        check: raises ``ConfigError`` for a configuration that cannot be run.
        may_continue: whether the output folder may hold a run already, which the function then checks.
        follow: called in the processes other than the first if ``torchrun`` starts several; ``None`` rejects them.
    """

    def decorate(function: Callable[[Config, Path], None]) -> Callable[[], None]:
        @functools.wraps(function)
        @exit_when_stdout_closes()
        def command() -> None:
            sys.argv[1:] = allow_new_options(rename_overrides(name, sys.argv[1:]))
            try:
                if mistakes := find_mistakes(name, kind, sys.argv[1:]):
                    raise ConfigError("\n".join(map(str, mistakes)))
                flags = parse_flags(name)
                _search_user_conf_dir(flags)
                if torchrun.world_size() > 1 and (follow is None or flags.multirun):
                    raise ConfigError(_ONE_TRAINING)
                if flags.help or flags.help_all:
                    print(_help(name, kind, function.__doc__ or "", MAIN_KEYS.get(name, ()) if flags.help else ()))
                    return
                jobs = _checked(name, flags, kind, check, may_continue)
            except MetalearnError as error:
                _exit_with_error(error)
            if flags.cfg == "job" and not flags.resolve:
                sys.argv.append("--resolve")
            if follow is None or torchrun.rank() == 0:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
                if len(ended) > 1:
                    from metalearn.commands.after_training import print_runs

                    print_runs(ended)
            elif jobs and not flags.cfg:  # without Hydra's folder and log, which are the first process's
                logging.basicConfig(format=f"[process {torchrun.rank()}] %(message)s")
                with _report_errors(name):
                    follow(jobs[0])

        def job(config: DictConfig) -> None:
            output_dir = Path(HydraConfig.get().runtime.output_dir)
            with _report_errors(name, output_dir):
                for folder in (output_dir, output_dir / "checkpoints"):
                    check_holds_files(folder)
                check_is_no_link(output_dir / f"{HydraConfig.get().job.name}.log")
                checked = to_dataclass(config, kind, HydraConfig.get().overrides.task)
                check(checked)
                if not may_continue(checked):
                    check_no_run_in(output_dir, RUN_FILES)
                function(checked, output_dir)
            ended.append((list(HydraConfig.get().overrides.task), output_dir))

        ended: list[tuple[list[str], Path]] = []
        return command

    return decorate


def _help(name: str, kind: type[Config], about: str, main: Sequence[str]) -> str:
    width = min(shutil.get_terminal_size().columns, _WIDEST_HELP)
    start, options = quote_command(invocation(name)), group_defaults(kind)
    return help_text(compose(name), kind, start, about, options, main=main, width=width)


def _search_user_conf_dir(flags: argparse.Namespace) -> None:
    """Search ``conf/`` in the current directory as if it were the ``--config-dir``."""
    if not flags.config_dir and (folder := user_conf_dir(flags.overrides)):
        flags.config_dir = folder
        sys.argv.insert(1, f"--config-dir={folder}")


def _checked(
    name: str,
    flags: argparse.Namespace,
    kind: type[Config],
    check: Callable[[Config], None],
    may_continue: Callable[[Config], bool],
) -> list[Config]:
    """Return the configuration of every job, before any begins; none if Hydra is asked for something else."""
    jobs = []
    for overrides, config, folder in requested_jobs(name, flags):
        job = to_dataclass(config, kind, overrides, flags.config_dir)
        check(job)
        _check_is_folder(overrides)
        if flags.multirun and may_continue(job) and not any("hydra.sweep.subdir=" in o for o in overrides):
            raise ConfigError(_NOTHING_TO_RESUME)
        if not flags.cfg:
            _check_writable(folder)
        jobs.append(job)
    return jobs


def _check_is_folder(overrides: Sequence[str]) -> None:
    for override in overrides:
        name, _, value = override.partition("=")
        path = Path(value.strip("'\""))
        there = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
        if name in ("hydra.run.dir", "hydra.sweep.dir") and os.path.lexists(there) and not there.is_dir():
            raise ConfigError(f"{override}: this is a file, or lies below one; name a folder")


def _check_writable(folder: str) -> None:
    """Check that the folder can be written before Hydra does, which would print a stack trace."""
    path = Path(folder).absolute()
    if "${" in str(path):  # of the folder that the command runs in, perhaps
        raise ConfigError(
            f"hydra.run.dir={path}: Hydra takes ${{ in a name for the name of a key; choose another folder"
        )
    there = next(p for p in (path, *path.parents) if os.path.isdir(p))  # not Path's, which raises on long names
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"hydra.run.dir={folder}: nothing can be written to {there} ({error.strerror}); choose another folder with "
            "hydra.run.dir=PATH"
        ) from None


_ONE_TRAINING = (
    "torchrun starts several processes of one training: give it scripts/train.py or -m metalearn train, "
    "without --multirun"
)
_NOTHING_TO_RESUME = (
    "run.resume with --multirun: the folders of a sweep are named by the time, so that there would be nothing to "
    "resume. Name folders that stay the same: hydra.sweep.dir=DIR 'hydra.sweep.subdir=seed${run.seed}', with every key "
    "that differs between the jobs"
)


@contextmanager
def _report_errors(name: str, output_dir: Path | None = None) -> Iterator[None]:
    """End a command on an error that a user can fix without a stack trace, and on a signal with its exit code.

    An output folder that is still empty is removed; ``None`` for a process that writes nothing.
    """
    try:
        with signals_as_exceptions():
            yield
    except TerminatedError as error:
        how_to_resume = _how_to_resume(name, error)
        _add_to_log(error, how_to_resume)
        _print_error(f"{error}{how_to_resume}")
        sys.exit(128 + error.signal)
    except MetalearnError as error:
        _remove_if_empty(output_dir)
        how_to_resume = _how_to_resume(name, error)
        _add_to_log(error, how_to_resume)
        _exit_with_error(error, how_to_resume)
    except OSError as error:
        of_output = output_dir and Path(str(error.filename)).is_relative_to(output_dir)
        if error.errno not in OS_ERROR_HINTS and not of_output:
            raise
        where = f" ({error.filename})" if error.filename else ""
        hint = OS_ERROR_HINTS.get(error.errno or 0, "Run again; resume a training with run.resume=true.")
        _exit_with_error(RunError(f"{error.strerror}{where}; {_written(output_dir)}\n{hint}"))
    except KeyboardInterrupt:
        _print_error(f"Interrupted; {_written(output_dir)}")
        sys.exit(130)


def _how_to_resume(name: str, error: MetalearnError) -> str:
    """Return the whole command that resumes a run from its checkpoint; empty if there is none."""
    if error.resumable is None or torchrun.rank():
        return ""
    under = ", started by torchrun as before" if torchrun.world_size() > 1 else ""
    command = command_again(name, format_assignment("hydra.run.dir", error.resumable), "run.resume=true")
    return f"\nThis resumes it{under}:\n  {command}"


def _written(output_dir: Path | None) -> str:
    _remove_if_empty(output_dir)
    if output_dir is None or not output_dir.exists():
        return "nothing was written."
    return f"what was written so far lies in\n  {quote_word(output_dir)}"


def _remove_if_empty(folder: Path | None) -> None:
    if folder and folder != Path.cwd():
        with suppress(OSError):  # it is not empty
            os.rmdir(folder)


def _exit_with_error(error: MetalearnError, how_to_resume: str = "") -> NoReturn:
    who = f"[process {torchrun.rank()}] " if torchrun.rank() else ""
    message = f"{who}{type(error).__name__}: {error}{how_to_resume}"
    torchrun.report_error(message)
    _print_error(message)
    sys.exit(2)


def _print_error(message: str) -> None:
    if sys.stderr is None:  # the shell has closed it: 2>&-
        return
    try:
        print(fit(message, sys.stderr), file=sys.stderr, flush=True)
    except OSError:  # nobody reads it any more, and the exit code still tells
        discard(sys.stderr)


def _add_to_log(error: MetalearnError, how_to_resume: str) -> None:
    """Write what ended a run into its log as well, if that is open: nobody may see the terminal any more."""
    if error.resumable is None:  # no run, or another process's
        return
    message, run_dir = f"{type(error).__name__}: {error}{how_to_resume}", error.resumable
    record = logging.LogRecord(__name__, logging.WARNING, "", 0, message, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == run_dir.absolute():
            with suppress(OSError), handler.lock or nullcontext():  # perhaps no space is left
                if handler.stream is not None:
                    handler.stream.write(f"{handler.format(record)}\n")
                    handler.flush()
