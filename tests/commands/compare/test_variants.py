"""A variant is the command line followed by its overrides; all are checked before anything runs."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from metalearn.commands.compare.launch import sweep
from metalearn.commands.compare.variants import check_compare, jobs, parse_variants
from metalearn.commands.output_folders import comparison_dir_name, running_twin, variant_names
from metalearn.config.commands_schema import CompareConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.core.errors import ConfigError
from metalearn.core.quoting import format_override
from metalearn.training.run_folder import folder_lock


def config(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> CompareConfig:
    monkeypatch.setattr(sys, "argv", ["compare.py", *overrides])
    return to_dataclass(compose("compare", overrides), CompareConfig)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("inner.second_order=true", "second_order"),
        ("inner.second_order=false", "first_order"),
        ("inner.engine=adjoint inner.steps=5", "engine-adjoint,steps-5"),
        ("model.hidden=[64,64] model=mlp", "hidden-_64,64_,model-mlp"),
        ("", "base"),
        ("data=größe", "data-gr__e"),
    ],
)
def test_variant_names(variant: str, name: str) -> None:
    assert variant_names([variant]) == [name]


def test_variant_names_spell_out_keys_when_ambiguous() -> None:
    names = variant_names(["inner.lr=0.1", "outer.lr=0.1", "inner.steps=3"])
    assert names == ["inner.lr-0.1", "outer.lr-0.1", "steps-3"]


def test_long_variant_names_are_shortened_and_differ() -> None:
    keys = " ".join(f"data.classes={i}" for i in range(30))
    first, second = variant_names([f"{keys} task.ways=3", f"{keys} task.ways=4"])
    assert len(first) == len(second) == 100
    assert first != second
    assert first[:91] == second[:91]


def test_variants_override_the_shared_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = config(monkeypatch, "task.ways=7", "compare.variants=['task.shots=2','inner.engine=adjoint task.ways=6']")
    two_shots, adjoint = parse_variants(shared)
    assert (two_shots.name, two_shots.config.task.ways, two_shots.config.task.shots) == ("shots-2", 7, 2)
    assert two_shots.config.eval.queries == 2, "what depends on a key follows it"
    assert (adjoint.config.inner.engine, adjoint.config.task.ways) == ("adjoint", 6)
    assert type(adjoint.config) is TrainConfig


def test_job_overrides_restore_its_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = ["data=glyphs", "model=mlp", "inner.lr=1e-5", "compare.seeds=[3,5]", "compare.variants=['task.ways=3']"]
    shared = config(monkeypatch, *keys)
    found = parse_variants(shared)
    first, second = jobs(found, shared.compare.seeds, tmp_path)
    assert [job.folder.name for job in (first, second)] == ["ways-3-seed3", "ways-3-seed5"]
    as_train = to_dataclass(compose("train", [*second.overrides, "run.seed=5"]), TrainConfig)
    assert as_train == second.config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compare.variants=['inner.stps=1']"], r"'inner\.stps=1': inner\.stps=1: there is no such key"),
        (["compare.variants=['inner.steps=-1']"], r"'inner\.steps=-1': inner\.steps=-1: must be a whole number"),
        (["compare.variants=['run.seed=1']"], r"run\.seed=1: a variant cannot set this"),
        (["compare.variants=['task.ways=3','task.ways=3']"], "two of them are called task.ways-3"),
        (["compare.variants=['task.ways=\"3']"], "No closing quotation"),
        (["compare.variants=[]"], r"compare\.variants=\[\]: must be one or more texts"),
        (["compare.seeds=[1,1]"], "a seed is listed twice"),
        (["compare.seeds=[-1]"], r"compare\.seeds=\[-1\]: must be one or more whole numbers, at least 0"),
        (["run.seed=7"], r"run\.seed=7: use compare\.seeds=\[7\] for a comparison"),
        (["run.resume=true"], r"run\.resume=True: a comparison resumes by itself \(compare\.resume\)"),
        (["compare.target_accuracy=95"], r"must be a number above 0 and at most 1 or null"),
    ],
)
def test_check_compare_raises_when_config_is_wrong(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_compare(config(monkeypatch, *overrides))


@pytest.mark.parametrize(
    "value", [None, True, 3, 1e-5, "a, 'b' \\", "a\\b", "a\\'b=", "\\\\", "/a b/é", [1, 2], "null"]
)
def test_format_override_round_trips(value: object) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (parsed,) = OverridesParser.create().parse_overrides([f"key={format_override(value)}"])
    read = parsed.value()
    assert str(read) == str(value)
    assert isinstance(value, str) or read == value


def test_sweep_composes_with_a_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("submitit") is None:
        assert not os.environ.get("CI"), "hydra-submitit-launcher belongs to the extra dev"
        pytest.skip("pip install hydra-submitit-launcher")
    shared = config(monkeypatch, "compare.variants=['inner.steps=2']")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=600"]
    overrides = sweep(jobs(parse_variants(shared), [0, 4], tmp_path), launcher, tmp_path)
    assert "run.seed=0,4" in overrides
    one = [o.replace("0,4", "4") for o in overrides]
    composed = compose("train", one, return_hydra_config=True)
    assert composed.hydra.launcher.partition == "gpu"
    assert composed.hydra.launcher._target_.endswith("SlurmLauncher")
    assert composed.hydra.sweep.dir == str(tmp_path)
    assert composed.hydra.sweep.subdir == "steps-2-seed4", "the folder that the comparison looks into"
    assert composed.inner.steps == 2


def test_comparison_dir_name_finds_unfinished_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*overrides: str) -> dict[str, Any]:
        return asdict(config(monkeypatch, "data=glyphs", "compare.variants=['inner.steps=1']", *overrides))

    wanted = settings()
    new = comparison_dir_name(tmp_path, wanted, "now")
    assert new == "steps-1-now"
    (tmp_path / "steps-1-then").mkdir()
    (tmp_path / "steps-1-then" / "comparison.yaml").write_text(OmegaConf.to_yaml(config_of_earlier_release(wanted)))
    assert comparison_dir_name(tmp_path, wanted, "now") == "steps-1-then"
    assert comparison_dir_name(tmp_path, settings("compare.jobs=7"), "now") == "steps-1-then"
    assert comparison_dir_name(tmp_path, settings("inner.lr=0.5"), "now") == new
    assert comparison_dir_name(tmp_path, settings("compare.resume=false"), "now") == new
    moved = {**wanted, "data": {**wanted["data"], "root": "/elsewhere"}}
    assert comparison_dir_name(tmp_path, moved, "now") == "steps-1-then", "where the data lies is no difference"
    results = tmp_path / "steps-1-then" / "results.json"
    results.write_text('{"complete": false}')
    assert comparison_dir_name(tmp_path, wanted, "now") == "steps-1-then", "a run failed, or was added"
    with folder_lock(tmp_path / "steps-1-then", wait=False):
        assert comparison_dir_name(tmp_path, wanted, "now") == new, "another process is at work there"
        assert running_twin(tmp_path / new, wanted) == tmp_path / "steps-1-then"
    assert running_twin(tmp_path / new, wanted) is None
    results.write_text('{"complete": true}')
    assert comparison_dir_name(tmp_path, wanted, "now") == new, "that one is finished"


def config_of_earlier_release(now: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with keys that were renamed, removed or added since."""
    before = copy.deepcopy(now)
    before["compare"]["rounds"] = before["compare"].pop("repeats")
    before["run"]["checkpoint_seconds"] = before["run"].pop("checkpoint_every_s")
    before["run"]["accept"] = []
    for section, key in (("run", "init_from"), ("inner", "optimizer_options"), ("algorithm", "backend")):
        del before[section][key]
    return before


@pytest.mark.parametrize("text", ["", "inner: 3", "{", "- 1", "data: {}\ninner: 3\n"])
def test_comparison_dir_name_is_new_beside_a_damaged_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "then").mkdir()
    (tmp_path / "then" / "comparison.yaml").write_text(text)
    config = {"compare": {"resume": True, "variants": ["inner.steps=1"]}}
    assert comparison_dir_name(tmp_path, config, "now") == "steps-1-now"
