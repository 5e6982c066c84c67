"""Neither the folders of runs nor checkpoints run code, and the sources call nothing that could."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn.commands.adapt.checks import check_adapt
from metalearn.commands.command_line import parse_flags, requested_jobs
from metalearn.commands.main import check_evaluate
from metalearn.config.commands_schema import AdaptConfig, EvaluateConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import load_run_config, load_trusted_config, to_yaml
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError
from metalearn.inference.loading import load
from metalearn.training.failures import replay_episode
from tests.config.factories import write_experiment
from tests.paths import REPO
from tests.training.run_folders import untrained

SOURCES = sorted([*(REPO / "metalearn").rglob("*.py"), *(REPO / "scripts").glob("*.py")])
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "code", "ctypes", "pty"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"),
    *("yaml.full_load", "runpy.run_path", "runpy.run_module"),
    *(f"{module}{name}" for module in ("", "hydra.utils.") for name in ("instantiate", "get_class", "get_method")),
    *("get_object", "hydra.utils.get_object", "hydra.utils.call"),
}
EXCEPTIONS = {
    ("metalearn/__init__.py", "importlib.import_module"): "names of this package's own, from a table in the file",
    (
        "metalearn/metagrad/baselines/common.py",
        "importlib.import_module",
    ): "names of libraries, from a table in the file",
    ("metalearn/config/target.py", "importlib.import_module"): "what the user names, or trusts by trust_code",
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
    """Yield the calls in a source that could run code named or stored elsewhere."""
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


ON_THE_COMMAND_LINE = {
    "--experimental-rerun=x.pickle": r"--experimental-rerun=x\.pickle: a pickle runs any code when it is read",
    "--config-path=x": r"--config-path=x: the primary files are the shipped ones.*--config-dir DIR",
    "--config-name=x": r"--config-name=x: the primary files are the shipped ones.*--config-dir DIR",
}


@pytest.mark.parametrize(("argument", "message"), ON_THE_COMMAND_LINE.items(), ids=list(ON_THE_COMMAND_LINE))
def test_flags_are_checked(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(requested_jobs("gradients", parse_flags("train", [argument])))


def test_two_search_paths_are_an_error(tmp_path: Path) -> None:
    # Hydra would search both, so the configuration that is checked would not be the one that is run.
    with pytest.raises(ConfigError, match=r"--config-dir=.*: give it or hydra\.searchpath"):
        list(
            requested_jobs(
                "gradients", parse_flags("train", ["--config-dir", str(tmp_path), f"hydra.searchpath=[{tmp_path}]"])
            )
        )


def test_every_option_of_a_glob_is_a_job(tmp_path: Path) -> None:
    write_experiment(tmp_path, "# @package _global_\ninner: {lr: -1}\n")
    arguments = ["--multirun", "--config-dir", str(tmp_path), "experiment=glob(m*)", "data=glyphs"]
    ((overrides, config, _),) = requested_jobs("train", parse_flags("train", arguments))
    assert "experiment=mine" in overrides
    assert config.inner.lr == -1


def test_rule_without_a_target_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("None", "none", "null"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it ran')\n")
    untrained(tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("optimizer: sgd", "optimizer: custom"))
    with pytest.raises(ConfigError, match=r"inner\.optimizer=custom: inner\.optimizer_target=MODULE:NAME is required"):
        load(tmp_path / "run")


def test_options_cannot_hide_what_is_named(tmp_path: Path) -> None:
    overrides = ["data=glyphs", "model=custom", "model.target=evil:run", "model.options.x=KEY"]
    text = to_yaml(to_dataclass(compose("train", overrides), TrainConfig))
    (tmp_path / "config.yaml").write_text(text.replace("KEY", '"\\e[2Jall is well"'))
    with pytest.raises(ConfigError) as error:
        load_trusted_config(tmp_path, trust_code=False)
    assert "model.options.x='\\x1b[2Jall is well'" in str(error.value)


def test_yaml_tags_make_no_objects(tmp_path: Path) -> None:
    attack = f"inner: {{lr: !!python/object/apply:os.mkdir ['{tmp_path}/made']}}"
    write_experiment(tmp_path, f"# @package _global_\n{attack}\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        compose("train", ["experiment=mine"], str(tmp_path))
    (tmp_path / "config.yaml").write_text(f"data: {{name: glyphs}}\n{attack}\n")
    with pytest.raises(ConfigError, match="not the configuration of a run"):
        load_run_config(tmp_path / "config.yaml")
    assert not (tmp_path / "made").exists()


TARGETS = {
    "data": ["data=custom", "data.target=evil:run"],
    "model": ["model=custom", "model.target=evil:run"],
    "algorithm": ["algorithm=custom", "algorithm.target=evil:run"],
    "rule": ["inner.optimizer=custom", "inner.optimizer_target=evil:run"],
}


@pytest.mark.parametrize("overrides", TARGETS.values(), ids=list(TARGETS))
def test_run_folder_runs_no_code_unless_trusted(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\n")
    glyphs = [] if "data=custom" in overrides else ["data=glyphs"]
    config = to_dataclass(compose("train", [*glyphs, *overrides]), TrainConfig)  # a user's would be imported here
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml") == config
    evaluation = to_dataclass(compose("evaluate", ["run.dir=."]), EvaluateConfig)
    adaptation = to_dataclass(compose("adapt", ["run.dir=.", "support=."]), AdaptConfig)
    episode = tmp_path / "episode.pt"
    files.save_checked({"episode": {}, "config": to_yaml(config)}, episode)
    for use, how in (
        (lambda: load("."), r"metalearn\.load\(run, trust_code=True\)"),
        (lambda: check_adapt(adaptation), r"run\.trust_code=true"),
        (lambda: check_evaluate(evaluation), r"run\.trust_code=true"),
        (lambda: replay_episode(episode), r"replay_episode\(path, trust_code=True\)"),
    ):
        with pytest.raises(ConfigError, match=rf"names code to run: \S+target=evil:run\. .*give {how}"):
            use()
    with pytest.raises(SystemExit, match="it ran"):
        load(".", trust_code=True)


@pytest.mark.parametrize("name", ["train", "adapt", "benchmark", "compare", "gradients", "reproduce", "verify"])
def test_shipped_configurations_pass(name: str) -> None:
    for arguments in (
        [],
        ["hydra/job_logging=default", "hydra/hydra_logging=default", "--cfg", "job"],
        ["hydra.run.dir=x", "hydra.job.name=mine", "--multirun"],
    ):
        assert len(list(requested_jobs(name, parse_flags("train", arguments)))) == 1
