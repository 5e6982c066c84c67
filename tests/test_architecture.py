"""Imports point one way: types, params <- derivatives, inner <- metagrad <- runs <- scripts.

Data and models know only the nouns.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metalearn
from tests.conftest import REPO

NOUNS = {"types", "params", "kernels", "errors", "files", "live_bytes", "threads", "operations", "graph_checks"}
MAY_IMPORT = {
    "errors": set(),
    "operations": set(),
    "graph_checks": set(),
    "types": set(),
    "files": {"errors"},
    "live_bytes": set(),
    "threads": set(),
    "kernels": set(),
    "module_checks": set(),
    "params": {"module_checks", "types"},
    "models": NOUNS,
    "data": NOUNS,
    "derivatives": {"types", "params", "errors", "operations", "graph_checks"},
    "gradcheck": {"types", "params", "derivatives"},
    "inner": {"types", "params", "errors", "kernels", "operations", "graph_checks"},
    "metagrad": {"types", "params", "errors", "derivatives", "inner"},
    "parts": set(),
    "algorithms": {"types", "parts", "inner", "metagrad"},
    "peers": {"types", "params", "errors", "inner", "metagrad"},
    "lab": NOUNS | {"models", "data", "derivatives", "gradcheck", "inner", "metagrad"},
    "runs": NOUNS
    | {"models", "data", "derivatives", "gradcheck", "inner", "metagrad", "peers", "lab", "parts", "algorithms"},
}
ONLY_IN = {
    "hydra": {"runs/command.py", "runs/config.py", "runs/config_help.py", "runs/overrides.py"},
    "omegaconf": {
        "runs/command.py",
        "runs/config.py",
        "runs/config_files.py",
        "runs/config_help.py",
        "runs/overrides.py",
        "runs/schema.py",
    },
    "tensorboard": {"runs/hparams.py", "runs/report.py"},
    "torch.utils.tensorboard": {"runs/hparams.py", "runs/tracking.py"},
    "torch.distributed": {"runs/distributed.py"},
    "learn2learn": {"peers/learn2learn.py"},
    "higher": {"peers/higher.py"},
    "torchopt": {"peers/torchopt.py"},
    "scipy": {"derivatives/spectrum.py", "runs/compare/statistics.py"},
    "joblib": {"runs/compare/launch.py"},
    "markdown": {"runs/compare/report.py"},
    "safetensors": {"runs/adaptation/adapted.py"},
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
def test_imports_point_one_way(path: Path) -> None:
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


def test_every_part_has_a_rule() -> None:
    parts = {p.relative_to(REPO / "metalearn").parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert parts == set(MAY_IMPORT)


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
