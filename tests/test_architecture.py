"""The house: which room may import which, which file brings which library, and what scripts may need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metalearn
from tests.conftest import REPO

MATHEMATICS = {"core", "models", "data", "derivatives", "inner", "metagrad"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "models": {"core"},
    "data": {"core"},
    "derivatives": {"core"},
    "inner": {"core", "models"},
    "config": {"core", "data"},
    "metagrad": {"core", "derivatives", "inner"},
    "algorithms": {"core", "inner", "metagrad"},
    "lessons": {"core", "data", "derivatives", "inner", "metagrad"},
    "training": MATHEMATICS | {"config", "algorithms", "lessons"},
    "inference": MATHEMATICS | {"config", "algorithms", "training"},
    "commands": MATHEMATICS | {"config", "algorithms", "lessons", "training", "inference"},
}
"""The rooms from the ground up: each imports only rooms that stand before it."""
ONLY_IN = {
    "hydra": {"commands/cli.py", "config/compose.py", "config/messages.py", "config/overrides.py"},
    "omegaconf": {
        "commands/cli.py",
        "config/compose.py",
        "config/run_config.py",
        "config/messages.py",
        "config/overrides.py",
    },
    "hydra._internal": set[str](),
    "pydantic": {
        "config/commands_schema.py",
        "config/messages.py",
        "config/schema.py",
        "config/validation.py",
    },
    "tensorboard": {"training/tracking/hparams.py", "training/tracking/event_files.py"},
    "torch.utils.tensorboard": {"training/tracking/hparams.py", "training/tracking/tensorboard.py"},
    "torch.distributed": {"training/runtime/distributed.py"},
    "learn2learn": {"metagrad/baselines/learn2learn.py"},
    "higher": {"metagrad/baselines/higher.py"},
    "torchopt": {"metagrad/baselines/torchopt.py"},
    "scipy": {"derivatives/eigenvalues.py", "commands/compare/statistics.py"},
    "joblib": {"commands/compare/launch.py"},
    "markdown": {"commands/compare/report.py"},
    "safetensors": {"inference/weights_file.py"},
}
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


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {p.relative_to(REPO / "metalearn").parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert rooms == set(MAY_IMPORT)
    order = list(MAY_IMPORT)
    for room, below in MAY_IMPORT.items():
        assert below <= set(order[: order.index(room)]), f"{room} may import a room that does not stand before it"


def test_public_surface_is_what_is_listed() -> None:
    for name in metalearn.__all__:
        assert getattr(metalearn, name) is not None
    assert set(metalearn.__all__) <= set(dir(metalearn))
    with pytest.raises(AttributeError, match=r"no attribute 'nope'; it offers SGD, Adam"):
        metalearn.nope  # noqa: B018  # the access is what is tested


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
    with pytest.warns(FutureWarning, match=rf"metalearn\.{old} is called metalearn\.(\w+) now"):
        value = getattr(metalearn, old)
    assert value.__name__ in metalearn.__all__
