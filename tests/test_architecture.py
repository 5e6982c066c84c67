"""The architecture: which package may import which, which file imports which library, and what scripts may need."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import metalearn
from tests.paths import REPO

MATHEMATICS = {"core", "models", "data", "derivatives", "inner", "metagrad"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "models": {"core"},
    "data": {"core"},
    "derivatives": {"core"},
    "inner": {"core", "models"},
    "pretrained": {"core"},
    "config": {"core", "data", "pretrained"},
    "metagrad": {"core", "derivatives", "inner"},
    "algorithms": {"core", "inner", "metagrad"},
    "lessons": {"core", "data", "derivatives", "inner", "metagrad"},
    "training": MATHEMATICS | {"config", "pretrained", "algorithms", "lessons"},
    "inference": MATHEMATICS | {"config", "pretrained", "algorithms", "training"},
    "commands": MATHEMATICS | {"config", "pretrained", "algorithms", "lessons", "training", "inference"},
    "__main__": {"commands"},
}
"""The packages from the ground up: each imports only packages that stand before it."""
ONLY_IN = {
    "hydra": {"commands/cli.py", "config/compose.py", "config/messages.py", "commands/command_line.py"},
    "omegaconf": {
        "commands/cli.py",
        "config/compose.py",
        "config/run_config.py",
        "config/help.py",
        "config/messages.py",
        "commands/command_line.py",
        "commands/output_folders.py",
    },
    "hydra._internal": set[str](),
    "shlex": {"core/quoting.py", "commands/output_folders.py"},
    "pydantic": {
        "config/commands_schema.py",
        "config/messages.py",
        "config/key_types.py",
        "config/options.py",
        "config/schema.py",
        "config/validation.py",
    },
    "tensorboard": {"training/tracking/tensorboard.py", "training/tracking/event_files.py"},
    "torch.utils.tensorboard": {"training/tracking/tensorboard.py"},
    "torch.distributed": {"training/runtime/distributed.py"},
    "learn2learn": {"metagrad/baselines/learn2learn.py"},
    "higher": {"metagrad/baselines/higher.py"},
    "torchopt": {"metagrad/baselines/torchopt.py"},
    "jax": {"commands/benchmark/jax.py"},
    "scipy": {"derivatives/eigenvalues.py", "commands/compare/statistics.py"},
    "joblib": {"commands/compare/launch.py"},
    "jinja2": {"commands/compare/report.py", "commands/reproduce/table.py"},
    "markdown": {"commands/compare/report.py"},
    "safetensors": {"pretrained/model_file.py", "inference/weights_file.py"},
}
LAYERS: dict[str, list[set[str]]] = {
    "training": [
        {"run_folder", "runtime"},
        {"evaluation", "state"},
        {"custom"},
        {"experiment"},
        {"tracking"},
        {"auto_engine", "checkpoints"},
        {"failures", "evaluate_run", "resume"},
        {"step"},
        {"loop"},
        {"trainer"},
    ],
    "training.runtime": [{"torchrun", "signals", "precision", "cuda_graph", "threads"}, {"distributed"}],
    "training.tracking": [
        {"tags"},
        {"console", "curvature", "event_files", "meter", "plot_style"},
        {"tensorboard"},
        {"images"},
    ],
}
"""Layers inside packages, from the ground up: a module imports only those of its package that are in a layer below."""
FILES = sorted((REPO / "metalearn").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it; ``from a import b`` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_point_downward(path: Path) -> None:
    inside = path.relative_to(REPO / "metalearn")
    part = inside.parts[0].removesuffix(".py")
    if part == "__init__":
        return
    for name in imported(path):
        if name.startswith("metalearn."):
            other = name.split(".")[1]
            assert other == part or other in MAY_IMPORT[part], f"{inside} imports {name}"
        for library, places in ONLY_IN.items():
            if name == library or name.startswith(f"{library}."):
                assert str(inside) in places, f"{inside} imports {name}"


def test_every_package_has_a_place_in_the_order() -> None:
    packages = {p.relative_to(REPO / "metalearn").parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert packages == set(MAY_IMPORT)
    order = list(MAY_IMPORT)
    for package, below in MAY_IMPORT.items():
        assert below <= set(order[: order.index(package)]), f"{package} may import one that is not below it"


COMMANDS: dict[str, set[str]] = {
    "shell": set(),
    "output_folders": set(),
    "command_line": set(),
    "mistakes": set(),
    "after_training": set(),
    "cli": set(),
    "processes": set(),
    "adapt": set(),
    "gradients": set(),
    "verify": set(),
    "benchmark": set(),
    "compare": {"benchmark"},
    "reproduce": {"benchmark", "compare"},
    "main": {"adapt", "benchmark", "compare", "gradients", "reproduce", "verify"},
}
"""The packages in ``commands/``, and which commands each may import besides ``SHARED``."""
SHARED = ["shell", "output_folders", "command_line", "mistakes", "after_training", "cli", "processes"]


@pytest.mark.parametrize("package", COMMANDS)
def test_commands_import_one_another_in_order(package: str) -> None:
    folder = REPO / "metalearn" / "commands"
    allowed = {package, *COMMANDS[package], *(SHARED[: SHARED.index(package)] if package in SHARED else SHARED)}
    for path in [*(folder / package).rglob("*.py"), *folder.glob(f"{package}.py")]:
        for name in imported(path):
            if name.startswith("metalearn.commands."):
                assert name.split(".")[2] in allowed, f"{path.relative_to(REPO)} imports {name}"


def test_every_command_has_a_place_in_the_order() -> None:
    commands = {p.relative_to(REPO / "metalearn/commands").parts[0] for p in FILES if "commands" in p.parts}
    assert {name.removesuffix(".py") for name in commands} - {"__init__"} == set(COMMANDS)
    order = list(COMMANDS)
    assert all(below <= set(order[: order.index(package)]) for package, below in COMMANDS.items())


@pytest.mark.parametrize("package", LAYERS)
def test_imports_inside_a_package_point_downward(package: str) -> None:
    folder = REPO / "metalearn" / package.replace(".", "/")
    level = {module: i for i, layer in enumerate(LAYERS[package]) for module in layer}
    assert set(level) == {p.stem for p in folder.iterdir() if not p.name.startswith("__")}
    for path in folder.rglob("*.py"):
        module = path.relative_to(folder).parts[0].removesuffix(".py")
        for name in imported(path):
            other = name.removeprefix(f"metalearn.{package}.").split(".")[0]
            if name.startswith(f"metalearn.{package}.") and other != module:
                assert level[other] < level[module], f"{path.relative_to(REPO)} imports {name}"


def test_public_surface_is_what_is_listed() -> None:
    for name in metalearn.__all__:
        assert getattr(metalearn, name) is not None
    assert set(metalearn.__all__) <= set(dir(metalearn))
    with pytest.raises(AttributeError, match=r"no attribute 'nope'; it offers SGD, Adagrad, Adam"):
        metalearn.nope  # noqa: B018  # the access is what is tested


TORCH_ALONE = """
import importlib, pkgutil, sys
ALLOWED = {"torch", "numpy", "metalearn", *sys.stdlib_module_names}

class Forbid:
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].startswith("importlib"):
            frame = frame.f_back
        importer = frame.f_globals["__name__"]
        assert not importer.startswith("metalearn") or name.split(".")[0] in ALLOWED, f"{importer} imports {name}"

sys.meta_path.insert(0, Forbid())
package = importlib.import_module(f"metalearn.{sys.argv[1]}")
for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
    if module.name.rpartition(".")[2] not in ("higher", "learn2learn", "torchopt"):  # imported where one is chosen
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("package", ["core", "derivatives", "models", "inner", "metagrad", "algorithms"])
def test_mathematics_imports_torch_alone(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TORCH_ALONE, package], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", sorted((REPO / "scripts").glob("*.py")), ids=lambda p: p.stem)
def test_what_a_script_refuses_need_not_wait_for_torch(script: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({str(script)!r})\n"
        "assert not (found := {'torch', 'torchvision', 'matplotlib'} & set(sys.modules)), found"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_scripts_are_short() -> None:
    for script in (REPO / "scripts").glob("*.py"):
        assert len(script.read_text().splitlines()) < 100, script


@pytest.mark.parametrize("old", ["parts_of", "with_learned", "with_steps"])
def test_former_public_name_works_and_warns(old: str) -> None:
    function = getattr(metalearn, old)
    with (
        pytest.warns(FutureWarning, match=rf"metalearn\.{old} is called metalearn\.(\w+) now"),
        pytest.raises(TypeError, match="missing"),
    ):
        function()
    assert function.__wrapped__.__name__ in metalearn.__all__
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("from metalearn import *", namespace)
    assert old in namespace
