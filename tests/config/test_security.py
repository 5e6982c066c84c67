"""Neither configurations nor checkpoints run code, and the sources call nothing that could."""

from __future__ import annotations

import ast
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn.config.compose import compose
from metalearn.config.overrides import parse_flags, requested_jobs
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError
from tests.config.factories import write_experiment
from tests.paths import REPO

SOURCES = sorted([*(REPO / "metalearn").rglob("*.py"), *(REPO / "scripts").glob("*.py")])
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "code", "ctypes", "pty"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "hydra.utils.instantiate",
    "hydra.utils.call",
    "hydra.utils.get_class",
    "hydra.utils.get_method",
    "hydra.utils.get_object",
    "instantiate",
    "get_class",
    "get_method",
    "get_object",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "runpy.run_path",
    "runpy.run_module",
}
EXCEPTIONS = {
    ("metalearn/__init__.py", "importlib.import_module"): "names of this package's own, from a table in the file",
    (
        "metalearn/metagrad/baselines/common.py",
        "importlib.import_module",
    ): "names of peers, from a table in the file",
    ("metalearn/core/profiling/hardware.py", "ctypes"): "mallopt of the C library that is loaded already",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def literal(call: ast.Call, name: str) -> Any:
    """Return the value of a keyword if it is a literal, else ``None``."""
    values = [k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)]
    return values[0] if values else None


def unsafe(tree: ast.AST, path: str) -> Iterator[str]:
    """Yield what in a source could run code that is named or stored elsewhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in UNSAFE_MODULES:
                yield f"from {node.module}"
            yield from (full for a in node.names if (full := f"{node.module}.{a.name}") in UNSAFE_CALLS)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in UNSAFE_CALLS:
                yield name
            if name.endswith("import_module") and not (node.args and isinstance(node.args[0], ast.Constant)):
                yield "importlib.import_module"
            if name.endswith("torch.load") and (
                path != "metalearn/core/serialization.py" or literal(node, "weights_only") is not True
            ):
                yield "torch.load"
            if any(k.arg in ("shell", "allow_pickle") and literal(node, k.arg) is not False for k in node.keywords):
                yield f"{name}(shell or allow_pickle)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_sources_run_no_stored_code(path: Path) -> None:
    name = path.relative_to(REPO).as_posix()
    found = set(unsafe(ast.parse(path.read_text()), name))
    assert found == {what for file, what in EXCEPTIONS if file == name}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import shelve as s",
        "eval(x)",
        "__import__(name)",
        "importlib.import_module(name)",
        "from hydra.utils import instantiate",
        "hydra.utils.get_class(x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)",
        "os.system(x)",
        "torch.load(x, weights_only=True)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(x)",
    ],
)
def test_scan_finds_unsafe_calls(source: str) -> None:
    assert list(unsafe(ast.parse(source), "metalearn/other.py"))
    assert list(unsafe(ast.parse("torch.load(x)"), "metalearn/core/serialization.py"))
    assert not list(unsafe(ast.parse("torch.load(x, weights_only=True)"), "metalearn/core/serialization.py"))


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.mkdir, (self.folder,)  # type: ignore[return-value]


def test_checkpoint_runs_no_code(tmp_path: Path) -> None:
    files.save_checked({"theta": Attack(tmp_path / "made")}, tmp_path / "last.pt")
    with pytest.raises(files.CorruptFileError, match=r"last\.pt"):
        files.load_checked(tmp_path / "last.pt")
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "last.pt", weights_only=False)  # the attack is one
    assert (tmp_path / "made").exists()


def check_command(*arguments: str, name: str = "gradients") -> None:
    flags = parse_flags(list(arguments))
    assert isinstance(flags, Namespace)
    list(requested_jobs(name, flags))


IN_FILES = {
    "callbacks: {x: {a: 1}}": r"hydra\.callbacks\.x\.a=1: callbacks are code.*Remove the key",
    "callbacks: {x: {_target_: os.mkdir, path: made}}": r"hydra\.callbacks\.x\._target_=os\.mkdir: this names code",
    "launcher: {_target_: os.mkdir}": r"hydra\.launcher\._target_=os\.mkdir: this names code to run",
    "launcher: {_target_: hydra_pluginsx.a}": r"hydra_pluginsx\.a: this names code to run",
    "job_logging: {_target_: hydra_plugins.a}": r"job_logging\._target_=hydra_plugins\.a: this names",
    "job_logging: {filters: {x: {(): os.mkdir, path: made}}}": r"hydra\.job_logging\.filters\.x\.\(\)=os\.mkdir: this ",
    "hydra_logging: {handlers: {x: {class: os.mkdir, path: made}}}": r"x\.class=os\.mkdir: must be one of",
    "job_logging: {handlers: {x: {class: logging.handlers.SocketHandler}}}": r"SocketHandler: must be one of",
    "job_logging: {handlers: {x: {class: logging.StreamHandler, stream: 'ext://os.environ'}}}": r"ext://os\.env",
    "job_logging: {handlers: {console: {.: {a: 1}}}}": r"hydra\.job_logging\.handlers\.console\.\.\.a=1: this",
    "job_logging: {handlers: {file: {filename: /bashrc}}}": r"filename=/bashrc: must be \$\{hydra\.runtime",
    "job_logging: {formatters: {plain: {format: '${oc.env:HOME}'}}}": r"settings of loggers must be spelt out",
    "job_logging: '${hydra.job}'": r"hydra\.job_logging=\$\{hydra\.job\}: Hydra's own keys must be spelt out",
    "job: {env_set: {PYTHONPATH: evil}}": r"hydra\.job\.env_set\.PYTHONPATH=evil: a configuration sets no environment",
    "job: {env_copy: [PATH]}": r"hydra\.job\.env_copy\.0=PATH: a configuration sets no environment",
    "job: {name: ../x}": r"hydra\.job\.name=\.\./x: must be letters",
    "output_subdir: /elsewhere": r"hydra\.output_subdir=/elsewhere: must be null or \.hydra",
    "overrides: {hydra: ['hydra/launcher=submitit_slurm']}": r"hydra\.overrides\.hydra\.0=.*overrides stand",
    "overrides: {task: ['lesson=maml']}": r"hydra\.overrides\.task\.0=lesson=maml: overrides stand on the command line",
    "sweeper: {params: {hydra.job.name: x}}": r"hydra\.sweeper\.params\.hydra\.job\.name=x: give what is swept",
    "sweeper: {max_batch_size: 2}": r"hydra\.sweeper\.max_batch_size=2: a file sets it",
    "searchpath: [pkg://this]": r"(?i)overriding hydra\.searchpath is only supported from the primary config",
}


def experiment(folder: Path, text: str) -> list[str]:
    write_experiment(folder, f"# @package _global_\n{text}\n")
    return ["--config-dir", str(folder), "experiment=mine", "data=glyphs"]


@pytest.mark.parametrize(("section", "message"), IN_FILES.items(), ids=list(IN_FILES))
def test_hydra_section_of_a_file_is_checked(section: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_command(*experiment(tmp_path, f"hydra:\n  {section}"), name="train")


@pytest.mark.parametrize("how", [["--multirun"], ["--cfg", "job"], ["--hydra-help"]], ids="".join)
def test_hydra_section_is_checked_when_hydra_only_prints_or_sweeps(how: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="callbacks are code"):
        check_command(*how, *experiment(tmp_path, "hydra: {callbacks: {x: {a: 1}}}"), name="train")


def test_launcher_is_set_only_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]"]
    check_command("--multirun", "lesson=maml,orders", *slurm)
    with pytest.raises(ConfigError, match=r"hydra\.launcher\._target_=.*SlurmLauncher: a file sets it"):
        check_command(*experiment(tmp_path / "a", "defaults: [override /hydra/launcher: submitit_slurm]"), name="train")
    setup = experiment(tmp_path / "b", "hydra: {launcher: {setup: [touch made]}}")
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.setup\.0=touch made: a file sets it.*on the command line"):
        check_command("--multirun", *setup, "hydra/launcher=submitit_slurm", name="train")


def test_every_option_of_a_glob_is_checked(tmp_path: Path) -> None:
    arguments = experiment(tmp_path, "hydra: {job_logging: {handlers: {file: {filename: x}}}}")
    arguments[arguments.index("experiment=mine")] = "experiment=glob(m*)"
    with pytest.raises(ConfigError, match="filename=x: must be"):
        check_command("--multirun", *arguments, name="train")


ON_THE_COMMAND_LINE = {
    "+hydra.callbacks.x={_target_:os.mkdir,path:made}": r"hydra\.callbacks\.x\._target_=os\.mkdir",
    "hydra.launcher._target_=os.mkdir": r"hydra\.launcher\._target_=os\.mkdir: this names code to run",
    "+hydra.job_logging.handlers.x={class:os.mkdir,path:made}": r"handlers\.x\.class=os\.mkdir: must be one of",
    "+hydra.job.env_set={PYTHONPATH:evil}": r"hydra\.job\.env_set\.PYTHONPATH=evil",
    "hydra.searchpath=[pkg://this]": r"hydra\.searchpath=pkg://this: must be a folder",
    "hydra.searchpath=[pkg\\://this]": r"hydra\.searchpath=pkg://this: must be a folder",
    "+_target_=os.mkdir": r"_target_=os\.mkdir: this names code to run",
    "--experimental-rerun=x.pickle": r"--experimental-rerun=x\.pickle: a pickle can run any code",
    "--config-path=x": r"--config-path=x: the primary files are the shipped ones.*--config-dir DIR",
    "--config-name=x": r"--config-name=x: must be one of the shipped files, adapt, benchmark",
}


@pytest.mark.parametrize(("argument", "message"), ON_THE_COMMAND_LINE.items(), ids=list(ON_THE_COMMAND_LINE))
def test_command_line_is_checked(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_command(argument)


def test_two_search_paths_are_an_error(tmp_path: Path) -> None:
    # Hydra would search both, so the configuration that is checked would not be the one that is run.
    with pytest.raises(ConfigError, match="give one of them"):
        check_command("--config-dir", str(tmp_path), f"hydra.searchpath=[{tmp_path}]")


@pytest.mark.parametrize("flag", ["--info", "--shell-completion"])
def test_flags_that_only_print_import_nothing(flag: str) -> None:
    with pytest.raises(ConfigError, match="must be a folder"):
        check_command("hydra.searchpath=[pkg://this]", flag)


def test_yaml_tags_make_no_objects(tmp_path: Path) -> None:
    folder = experiment(tmp_path, f"inner: {{lr: !!python/object/apply:os.mkdir ['{tmp_path}/made']}}")[1]
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        compose("train", ["experiment=mine"], folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["train", "adapt", "benchmark", "compare", "gradients", "reproduce", "verify"])
def test_shipped_configurations_pass(name: str) -> None:
    check_command(name=name)
    check_command("hydra/job_logging=default", "hydra/hydra_logging=default", "--cfg", "job", name=name)
    check_command("hydra.run.dir=x", "hydra.job.name=mine", "--multirun", name=name)


def test_command_runs_no_code_of_an_experiment_file(tmp_path: Path) -> None:
    made = tmp_path / "made"
    attack = f"hydra: {{callbacks: {{x: {{_target_: os.mkdir, path: {made}}}}}}}"
    done = subprocess.run(
        [
            sys.executable,
            str(REPO / "scripts" / "train.py"),
            *experiment(tmp_path, attack),
            "hydra.run.dir=out",
            "outer.iterations=1",
            "eval.episodes=2",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "this names code to run" in done.stderr
    assert not made.exists()
    assert not (tmp_path / "out").exists()
