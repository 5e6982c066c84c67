"""The shipped configuration: experiments, defaults and ``--help``."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pytest

from metalearn import InnerLoop
from metalearn.config.compose import CONF, compose, group_defaults
from metalearn.config.help import MAIN_KEYS, help_text
from metalearn.config.messages import (
    describe_allowed,
    description,
    hints,
    nearest_key,
    section_class,
    section_classes,
)
from metalearn.config.options import GlyphsConfig, OmniglotConfig
from metalearn.config.schema import ENGINES as ENGINE_NAMES
from metalearn.config.schema import TrainConfig, iter_fields
from metalearn.data.glyphs import make_glyphs
from metalearn.data.metadata import OMNIGLOT_SPLITS
from metalearn.metagrad import ENGINES
from metalearn.models import MLP, Conv4
from tests.config.factories import SCHEMAS, train_config, write_experiment
from tests.paths import REPO

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OMNIGLOT_EXPERIMENTS = [name for name in EXPERIMENTS if name.startswith("omniglot") and "maml_pp" not in name]


def test_experiments_of_a_folder_with_a_comma_are_found(tmp_path: Path) -> None:
    write_experiment(tmp_path / "my, own", "# @package _global_\ninner:\n  steps: 7\n")
    assert train_config("experiment=mine", config_dir=tmp_path / "my, own").inner.steps == 7


def test_metalearn_data_is_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images_background").mkdir()
    monkeypatch.setenv("METALEARN_DATA", str(tmp_path))
    data = train_config().data
    assert isinstance(data, OmniglotConfig)
    assert data.root == str(tmp_path)


@pytest.mark.parametrize("name", [name for name in OMNIGLOT_EXPERIMENTS if "_cpu" not in name])
def test_experiments_have_finns_hyperparameters(name: str) -> None:
    config = train_config(f"experiment={name}")
    ways, shots = (int(n) for n in re.findall(r"\d+", name))
    task = config.task
    assert (task.ways, task.shots, task.queries, config.eval.queries) == (ways, shots, shots, shots)
    expected = (0.4, 1, 32) if ways == 5 else (0.1, 5, 16)
    assert (config.inner.lr, config.inner.steps, task.meta_batch) == expected
    assert config.inner.eval_steps > config.inner.steps
    assert (config.outer.lr, config.outer.iterations, config.outer.schedule) == (1e-3, 60_000, "constant")


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.endswith("_cpu")])
def test_cpu_experiments_differ_only_in_the_training_budget(name: str) -> None:
    published, cheap = (
        dict(iter_fields(train_config(f"experiment={which}"))) for which in (name.removesuffix("_cpu"), name)
    )
    budget = {"task.queries", "task.meta_batch", "outer.lr", "outer.iterations", "outer.schedule"}
    steps = {"inner.lr", "inner.steps", "inner.eval_steps"}  # at 20 ways one of 0.4, as at 5 ways, and not five of 0.1
    pooling = {"model.pool"} if cheap["task.ways"] == 20 else set()  # as Vinyals et al. have it
    assert {key for key in published if published[key] != cheap[key]} <= budget | steps | pooling
    assert (cheap["inner.lr"], cheap["inner.steps"], cheap["inner.eval_steps"]) == (0.4, 1, 3)
    assert cheap["outer.iterations"] * cheap["task.meta_batch"] < 120_001
    assert cheap["outer.schedule"] == "cosine"


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.endswith("_cpu")])
def test_meta_curvature_differs_only_in_the_algorithm_and_its_budget(name: str) -> None:
    maml, curved = (dict(iter_fields(train_config(f"experiment={name}{which}"))) for which in ("", "_meta_curvature"))
    assert {key for key in maml if maml[key] != curved[key]} <= {"algorithm.name", "outer.iterations"}
    assert curved["algorithm.name"] == "meta_curvature"
    assert curved["outer.iterations"] <= maml["outer.iterations"]


def test_four_classic_experiments_exist() -> None:
    names = {f"omniglot_{n}way_{k}shot" for n in (5, 20) for k in (1, 5)}
    assert names | {f"{name}_cpu" for name in names} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_explains_every_key(name: str) -> None:
    kind: Any = SCHEMAS[name]
    whole = help_text(compose(name), kind, f"python scripts/{name}.py", "Does it.", group_defaults(kind))
    assert max(map(len, whole.splitlines())) <= 80
    text = re.sub(r"\s+", " ", whole)
    keys = {key: hint for key, hint in hints(kind).items() if not section_classes(hint)}
    keys |= {
        f"{section}.{key}": hint
        for section, hint in hints(kind).items()
        for cls in section_classes(hint)
        for key, hint in hints(cls).items()
    }
    for key, hint in keys.items():
        assert description(hint), f"{key} has no description"
        assert f" {key}=" in text
        assert f"{description(hint)} ({describe_allowed(hint)})" in text, key
    assert "usage: python scripts/" in text


@pytest.mark.parametrize("name", MAIN_KEYS)
def test_short_help_has_a_screen_of_keys(name: str) -> None:
    kind: Any = SCHEMAS[name]
    options = group_defaults(kind)
    text = help_text(compose(name), kind, f"metalearn {name}", "Does it.", options, main=MAIN_KEYS[name])
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 50
    assert [line.strip().partition("=")[0] for line in text.splitlines() if re.match(r"  [\w.]+=", line)][
        : len(MAIN_KEYS[name])
    ] == list(MAIN_KEYS[name])
    assert all(nearest_key(key, kind, exact=True) for key in MAIN_KEYS[name])
    assert "--help-all shows all" in text


def defaults_of(function: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


def test_yaml_and_signatures_have_the_same_defaults() -> None:
    inner, library = train_config().inner, defaults_of(InnerLoop)
    for name in ("second_order", "engine", "task_chunk"):
        assert getattr(inner, name) == library[name]
    assert inner.checkpoint_every == library["checkpoint_every"]
    data = train_config("data=glyphs").data
    assert isinstance(data, GlyphsConfig)
    assert (data.jitter, data.seed) == (defaults_of(make_glyphs)["jitter"], defaults_of(make_glyphs)["seed"])
    conv4, mlp = asdict(train_config().model), asdict(train_config("model=mlp").model)
    assert (conv4["width"], conv4["pool"]) == (defaults_of(Conv4)["width"], defaults_of(Conv4)["pool"])
    assert (tuple(mlp["hidden"]), mlp["batch_norm"]) == (defaults_of(MLP)["hidden"], defaults_of(MLP)["batch_norm"])


def test_names_in_the_schema_are_those_of_the_library() -> None:
    assert tuple(ENGINES) == ENGINE_NAMES
    omniglot: Any = section_class(TrainConfig, "data", "omniglot")
    assert describe_allowed(hints(omniglot)["split"]) == f"one of {', '.join(OMNIGLOT_SPLITS)}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_holds_no_default(name: str) -> None:
    kind: Any = SCHEMAS[name]
    for cls in (kind, *(c for hint in hints(kind).values() for c in section_classes(hint))):
        assert all(f.default is MISSING and f.default_factory is MISSING for f in fields(cls)), cls.__name__


@pytest.mark.parametrize("arguments", [["inner.lr=abc", "eval.evry=1"], ["data=glyphs", "task.ways=2000"]])
def test_error_of_a_command_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"sys.argv = ['scripts/train.py', *{arguments!r}]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert all(re.search(rf"^(ConfigError: )?{argument}: ", done.stderr, re.MULTILINE) for argument in arguments[-1:])
