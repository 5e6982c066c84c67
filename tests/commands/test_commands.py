"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from metalearn.config.commands_schema import GradientsConfig, VerifyConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.core.errors import ConfigError
from metalearn.core.quoting import format_override
from tests.commands.process import SMALL, bash, command
from tests.paths import REPO


def test_train_from_another_folder_then_evaluate(tmp_path: Path) -> None:
    trained = command("train.py", "inner.second_order=true", *SMALL, cwd=tmp_path)
    assert "test accuracy" in trained.stdout
    assert "non-transductive" in trained.stdout
    (metrics_file,) = tmp_path.glob("outputs/glyphs-5w1s/maml-second_order-seed0-*/metrics.json")
    run_dir = metrics_file.parent
    names = {p.name for p in run_dir.iterdir()}
    assert {"config.yaml", "metrics.json", "checkpoints", "train.log"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    metrics = json.loads(metrics_file.read_text())

    command("evaluate.py", f"run.dir={run_dir}", cwd=tmp_path)
    (again_file,) = run_dir.glob("evaluations/*/metrics.json")
    tests = [
        {k: v for k, v in m.items() if k.startswith("test.")} for m in (json.loads(again_file.read_text()), metrics)
    ]
    assert tests[0] == tests[1]

    command("evaluate.py", f"run.dir={run_dir}", "eval.queries=3", "hydra.run.dir=wider", cwd=tmp_path)
    assert json.loads((tmp_path / "wider" / "metrics.json").read_text())["test.queries"] == 3

    onto = command("evaluate.py", f"run.dir={run_dir}", f"hydra.run.dir={run_dir}", cwd=tmp_path, code=2)
    assert "already holds a run (its config.yaml)" in onto.stderr
    assert json.loads(metrics_file.read_text()) == metrics

    damaged = run_dir / "checkpoints" / "best.pt"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    restored = command("evaluate.py", f"run.dir={run_dir}", "hydra.run.dir=restored", cwd=tmp_path, COLUMNS="400")
    output = " ".join(restored.stdout.split())
    assert "best.pt is damaged" in output
    assert "best parameters are taken from the state instead" in output
    restored_metrics = json.loads((tmp_path / "restored" / "metrics.json").read_text())
    assert restored_metrics["test.accuracy"] == metrics["test.accuracy"]

    for state in run_dir.glob("checkpoints/state-*.pt"):
        state.write_bytes(b"")
    assert "every checkpoint is damaged" in command("evaluate.py", f"run.dir={run_dir}", cwd=tmp_path, code=2).stderr


def test_run_dir_is_honoured_and_never_shared(tmp_path: Path) -> None:
    first = command("train.py", *SMALL, "hydra.run.dir=mine", cwd=tmp_path)
    assert (tmp_path / "mine" / "metrics.json").is_file()
    assert "To see its plots:\n  tensorboard --logdir .\n" in first.stdout
    other = shlex.join(["python", str(REPO / "scripts" / "train.py"), *SMALL, "inner.second_order=false"])
    assert f"To compare with the first order:\n  {other}\n" in first.stdout
    logged = (tmp_path / "mine" / "train.log").read_text()
    second = command("train.py", *SMALL, "hydra.run.dir=mine", cwd=tmp_path, code=2)
    assert "mine already holds a run" in second.stderr
    assert "The command that started it resumes it with run.resume=true." in second.stderr
    assert (tmp_path / "mine" / "train.log").read_text() == logged
    (tmp_path / "file").touch()
    third = command("train.py", *SMALL, "hydra.run.dir=file", cwd=tmp_path, code=2)
    assert "hydra.run.dir=file: this is a file, or lies below one; name a folder" in third.stderr


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pipe", "this is a file, or lies below one; name a folder"),
        ("pipe/below", "this is a file, or lies below one; name a folder"),
        ("/dev/null", "this is a file, or lies below one; name a folder"),
        ("dangling", "this is a file, or lies below one; name a folder"),
        ("x" * 300, "nothing can be written to .* (File name too long); choose another folder"),
    ],
)
def test_what_is_no_folder_is_named(place: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    done = command("train.py", *SMALL, f"hydra.run.dir={place}", cwd=tmp_path, code=2)
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), " ".join(done.stderr.split()))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "checkpoints", "benchmark.json"])
def test_nothing_of_the_users_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    refused = command("train.py", *SMALL, "hydra.run.dir=mine", cwd=tmp_path, code=2)
    assert f"already holds a run (its {name})" in refused.stderr
    assert (tmp_path / "mine" / name).read_text() == "mine"
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [name]


def test_fallback_is_loud_and_in_the_name(tmp_path: Path) -> None:
    small = [override for override in SMALL if not override.startswith("data")]
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "data").touch()  # a file, so that nothing can be downloaded
    run = command("train.py", *small, cwd=tmp_path, METALEARN_CACHE=str(cache))
    assert "NO OMNIGLOT" in run.stdout
    (metrics_file,) = tmp_path.glob("outputs/glyphs-5w1s/*/metrics.json")
    assert json.loads(metrics_file.read_text())["dataset"] == "glyphs"


def test_multirun_gives_each_job_a_folder(tmp_path: Path) -> None:
    printed = command("train.py", "--multirun", "inner.second_order=true,false", *SMALL, cwd=tmp_path).stdout
    found = list(tmp_path.glob("outputs/sweeps/*/glyphs-5w1s/maml-*/metrics.json"))
    assert {json.loads(p.read_text())["second_order"] for p in found} == {True, False}
    assert len({p.parents[2] for p in found}) == 1, "one sweep, one folder"
    assert {p.name for p in tmp_path.iterdir()} == {"outputs"}
    table = printed[printed.index("2 runs") :]
    for order in ("true", "false"):
        assert re.search(rf"(?i)│ inner.second_order={order} +│ +accuracy +\d+\.\d+% ± +\d+\.\d+% │ +\d+\.\d │", table)
    assert "To compare with" not in printed, "a sweep has compared"


def test_sweep_resumes_when_its_folders_have_names(tmp_path: Path) -> None:
    resumed = [*SMALL, "run.seed=0,1", "run.resume=auto"]
    refused = command("train.py", "--multirun", *resumed, cwd=tmp_path, code=2)
    assert "the folders of a sweep are named by the time" in refused.stderr
    named = ["hydra.sweep.dir=mine", "hydra.sweep.subdir=seed${run.seed}"]
    command("train.py", "--multirun", *resumed, *named, cwd=tmp_path)
    (tmp_path / "mine" / "seed1" / "metrics.json").unlink()
    again = command("train.py", "--multirun", *resumed, *named, cwd=tmp_path)
    assert "This run is finished: " in again.stdout
    assert "Resuming from meta-step 4" in again.stdout
    assert {p.parent.name for p in tmp_path.rglob("metrics.json")} == {"seed0", "seed1"}


def test_cfg_job_prints_the_configuration(tmp_path: Path) -> None:
    printed = command("train.py", "--cfg", "job", "inner.lr=0.25", cwd=tmp_path).stdout
    assert re.search(r"inner:\n  lr: 0\.25\n", printed)
    assert "  queries: 1\n  validation_episodes" in printed, "no ${task.shots}"
    assert "${" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("train.py", r"inner\.second_order=true\n"),
        ("evaluate.py", "run.device="),
        ("gradients.py", r"  lesson=all\n +the lesson on second-order gradients to run, or all of them"),
    ],
)
def test_help(script: str, line: str, tmp_path: Path) -> None:
    printed = command(script, "--help", cwd=tmp_path).stdout
    assert f"usage: python {REPO / 'scripts' / script}" in printed
    assert re.search(line, printed)
    whole = command(script, "--help-all", cwd=tmp_path).stdout
    assert ("run.threads=auto" in whole) == (script == "train.py")
    assert (whole != printed) == (script == "train.py")


@pytest.mark.parametrize("folder", ["mine", "a b=c 'd' \"e\" $f (g) \\ é"])
def test_run_that_ends_early_names_the_command_that_resumes_it(folder: str, tmp_path: Path) -> None:
    given = [*SMALL, "eval.every=1", "outer.lr=1e30", "outer.schedule=constant"]
    ended = command("train.py", *given, f"hydra.run.dir={format_override(folder)}", cwd=tmp_path, code=2)
    assert re.search(r"The checkpoint of meta-step \d is kept\.\nThis resumes it:\n  .*\n$", ended.stderr)
    (printed,) = re.findall(r"^Run folder: (.*)$", ended.stdout, flags=re.MULTILINE)
    shown, again = bash(f"path {printed}\n{ended.stderr.splitlines()[-1]}", cwd=tmp_path)
    assert shown == ["path", str(tmp_path / folder)]
    log = (tmp_path / folder / "train.log").read_text()
    assert ended.stderr.splitlines()[-1] in log, "nobody may see the terminal any more"
    *start, place, resume = again
    assert start == ["python", str(REPO / "scripts" / "train.py"), *given]
    assert resume == "run.resume=true"
    resumed = command("train.py", *given, place, resume, cwd=tmp_path, code=2)
    assert "Resuming from meta-step" in resumed.stdout
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    command("train.py", *SMALL, "run.device=cuda:99", "hydra.run.dir=mine", cwd=tmp_path, code=2)
    assert not list(tmp_path.iterdir())


def test_missing_device_is_an_error(tmp_path: Path) -> None:
    refused = command("train.py", "run.device=cuda:99", "data=glyphs", cwd=tmp_path, code=2)
    assert "run.device=cuda:99: PyTorch sees" in refused.stderr


@pytest.mark.parametrize(
    ("schema", "override", "message"),
    [
        (GradientsConfig, "lesson=nope", r"lesson=nope: must be one of all, create_graph, .*, pinn, maml"),
        (GradientsConfig, "lesson=hvpp", r"lesson=hvpp: must be one of all, .*\. Did you mean hvp\?"),
        (GradientsConfig, "lesson=null", r"lesson=null: must be one of all"),
        (GradientsConfig, "leson=hvp", r"leson=hvp: there is no such key\. Did you mean lesson\?"),
        (GradientsConfig, "+extra=1", r"extra=1: there is no such key\. The keys are lesson\."),
        (VerifyConfig, "run.dtype=float16", r"run\.dtype=float16: must be one of float64, float32"),
        (VerifyConfig, "run.device=gpu", r"run\.device=gpu: must be auto, cpu, cuda or cuda:N"),
        (VerifyConfig, "verify.steps=[]", r"verify\.steps=\[\]: must be one or more whole numbers, at least 1"),
        (VerifyConfig, "verify.steps=[0,1]", r"steps=\[0, 1\]: must be one or more whole numbers, at least 1"),
        (VerifyConfig, "verify.stps=[1]", r"stps=\[1\]: there is no such key\. Did you mean verify\.steps\?"),
    ],
)
def test_config_raises_when_invalid(schema: type[Any], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_dataclass(compose(schema.__name__.removesuffix("Config").lower(), [override]), schema)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train", ["inner.second_ordr=true"], "Did you mean inner.second_order?"),
        ("train", ["inner.second_order=maybe"], "inner.second_order=maybe: must be true or false"),
        ("train", ["--cfg", "job", "inner.steps=-1"], "inner.steps=-1: must be a whole number, at least 0"),
        ("train", ["data.root=/nonexistent"], "data.root=/nonexistent: there is no such folder"),
        ("train", ["--multirun", "inner.steps=1,-2"], "inner.steps=-2: must be"),
        ("train", ["--multirun", "inner.second_ordr=true,false"], "Did you mean inner.second_order?"),
        ("evaluate", ["run.dir=typo"], "run.dir=typo: there is no such folder of a run"),
        ("adapt", ["run.dir=typo", "support=support"], "run.dir=typo: there is no such folder of a run"),
        ("compare", ["compare.variants=['inner.second_ordr=true']"], "Did you mean inner.second_order?"),
        ("compare", ["compare.sedes=[1]"], "Did you mean compare.seeds?"),
        ("compare", ["data.root=/nonexistent"], "data.root=/nonexistent: there is no such f"),
        ("reproduce", ["experiment_name=nope"], "nope: there is no such experiment. The rows are omniglot_20way_1shot"),
        ("gradients", ["lesson=nope"], "ConfigError: lesson=nope: must be one of all, create_graph, backward,"),
    ],
)
def test_config_error_is_one_message_and_makes_no_folder(
    script: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    assert message in command(f"{script}.py", *arguments, cwd=tmp_path, code=2).stderr
    assert not list(tmp_path.iterdir())
