"""The wheel, installed into a new environment, gives the commands; nothing of the checkout is needed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import metalearn
from metalearn.commands.reproduce.plan import check_reproduce
from metalearn.config.commands_schema import ReproduceConfig
from metalearn.config.compose import compose, to_dataclass, user_conf_dir
from metalearn.core.errors import ConfigError
from metalearn.data.glyphs import make_glyphs
from tests.commands.process import SMALL
from tests.paths import REPO


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        if os.environ.get("CI"):
            pytest.fail("hatchling is not installed on CI, so no wheel is built")
        pytest.skip("hatchling is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scripts of a new environment, which has the wheel and the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    bin_dir = folder / ("Scripts" if os.name == "nt" else "bin")
    install = [sys.executable, "-m", "pip", "--python", str(bin_dir / "python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    # A path file is not looked for in folders that another one names, so that an editable installation stays unseen.
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    packages = sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)})
    (Path(packages) / "libraries.pth").write_text("\n".join(libraries))
    return bin_dir


def run(environment: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    shell = {name: value for name, value in os.environ.items() if name not in ("METALEARN_DATA", "PYTHONPATH")}
    shell["PATH"] = f"{environment}{os.pathsep}{shell['PATH']}"  # it is activated
    program = str(environment / command[0])
    return subprocess.run(
        [program, *command[1:]],
        cwd=cwd,
        env={"OMP_NUM_THREADS": "1", **shell},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_wheel_holds_the_configuration(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("metalearn/conf/")]
        shipped = {name.removeprefix("metalearn/"): archive.read(name) for name in names}
    assert shipped == {p.relative_to(REPO).as_posix(): p.read_bytes() for p in (REPO / "conf").rglob("*.yaml")}


def test_trains_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    trained = run(environment, "metalearn", "train", *SMALL, "outer.iterations=2", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    (metrics,) = tmp_path.glob("outputs/glyphs-5w1s/maml-second_order-seed0-*/metrics.json")
    assert json.loads(metrics.read_text())["iterations"] == 2
    assert list(metrics.parent.glob("events.out.tfevents*"))
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_shipped_model_adapts_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    drawings = 255 - make_glyphs(classes=5, drawings=4, seed=9)[:, :, 0]
    for c, d in itertools.product(range(5), range(4)):
        path = tmp_path / ("support" if d == 0 else "query") / f"class{c}" / f"{d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawings[c, d].numpy()).save(path)
    adapted = run(
        environment, "metalearn", "adapt", "run=omniglot-5w1s", "support=support", "query=query", cwd=tmp_path
    )
    assert adapted.returncode == 0, adapted.stderr
    load = "import metalearn; print(metalearn.__file__); print(metalearn.load('omniglot-20w1s', 'cpu').card['name'])"
    file, name = run(environment, "python", "-c", load, cwd=tmp_path).stdout.split()
    assert file.startswith(str(environment.parent))
    assert name == "omniglot-20w1s"


def test_trains_own_code_of_the_current_folder(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from metalearn.models import MLP\ndef net(ways): return MLP(784, ways, hidden=(4,))\n"
    )
    (tmp_path / "random.py").write_text("raise SystemExit('not the random of the standard library')\n")
    small = [override for override in SMALL if not override.startswith("model")]
    own = ["model=custom", "model.target=nets:net", "outer.iterations=1", "eval.every=1", "hydra.run.dir=run"]
    trained = run(environment, "metalearn", "train", *small, *own, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "target: nets:net" in (tmp_path / "run" / "config.yaml").read_text()


def test_command_line_without_a_checkout(environment: Path, tmp_path: Path) -> None:
    where = run(environment, "python", "-c", "import metalearn; print(metalearn.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(environment.parent))
    assert run(environment, "metalearn", "--version", cwd=tmp_path).stdout == f"metalearn {metalearn.__version__}\n"
    commands = run(environment, "metalearn", "--help", cwd=tmp_path).stdout
    assert "  train      Train MAML on few-shot tasks" in commands
    typed = run(environment, "metalearn", "evaluate", "--help", cwd=tmp_path)
    assert "usage: metalearn evaluate [KEY=VALUE" in typed.stdout
    module = run(environment, "python", "-m", "metalearn", "evaluate", "--help", cwd=tmp_path)
    assert module.stdout == typed.stdout.replace("usage: metalearn", "usage: python -m metalearn")
    unknown = run(environment, "metalearn", "trian", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "metalearn trian: there is no such command. Did you mean train?" in unknown.stderr


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return an experiment file of the user's, below ``tmp_path``."""
    path = tmp_path / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ninner: {lr: 0.125}\n")
    return path


def test_conf_in_the_current_folder_adds_experiments(environment: Path, mine: Path, tmp_path: Path) -> None:
    shown = run(environment, "metalearn", "train", "experiment=mine", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "inner:\n  lr: 0.125\n" in shown.stdout


def test_conf_in_the_current_folder_adds_rows(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = to_dataclass(compose("reproduce", ["experiment_name=mine", "overrides=['data=glyphs']"]), ReproduceConfig)
    with pytest.raises(ConfigError, match="experiment_name=mine: there is no such experiment"):
        check_reproduce(config)
    monkeypatch.chdir(mine.parents[2])
    check_reproduce(config)


def test_conf_in_the_current_folder_is_searched_by_default(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    assert user_conf_dir() is None, "this one is the shipped one"
    monkeypatch.chdir(mine.parents[2])
    assert user_conf_dir() == str(mine.parents[1])
    assert user_conf_dir(["hydra.searchpath=[elsewhere]"]) is None
    assert compose("train", ["experiment=mine"]).inner.lr == 0.125
    with pytest.raises(ConfigError, match=r"experiment=mine: there is no such option"):
        compose("train", ["experiment=mine"], config_dir=str(REPO / "conf"))
