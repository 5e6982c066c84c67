"""Configurations of existing runs, and the data set that is really used."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from metalearn.config.options import OmniglotConfig
from metalearn.config.run_config import load_run_config, relocate_data, resolve_data, resolve_resume, to_yaml
from metalearn.core.errors import ConfigError, RunError
from tests.config.factories import train_config
from tests.paths import REPO


def test_saved_configuration_is_loaded_as_it_was(tmp_path: Path) -> None:
    for overrides in (
        ["data=glyphs", "model=mlp", "model.hidden=[4,4]"],
        ["inner.task_chunk=3", "run.init_from='1e3'"],
    ):
        config = train_config(*overrides)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_run_config(tmp_path / "config.yaml") == config


def test_run_of_an_earlier_release_is_loaded_with_the_defaults() -> None:
    older = REPO / "outputs" / "reference" / "omniglot-5w1s" / "maml-second_order-seed0" / "config.yaml"
    assert "snapshot_every" not in older.read_text()
    config = load_run_config(older)
    assert (config.inner.checkpoint_every, config.run.precision, config.log.curvature_every) == (1, "float32", 100)
    assert config.inner.lr == 0.4


@pytest.mark.parametrize("key", ["inner.lr", "inner.eval_steps", "run.seed", "data.seed", "outer.schedule"])
def test_key_that_a_run_has_lost_is_an_error(key: str, tmp_path: Path) -> None:
    content = asdict(train_config("data=glyphs"))
    section, _, name = key.partition(".")
    del content[section][name]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(content))
    with pytest.raises(ConfigError, match=rf"{key} is required"):
        load_run_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("text", ["", "a: 1", "- 1", "data: {name: nope}", "{", "data: 3", "data: ${data}", "3"])
def test_file_that_is_no_configuration_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is not the configuration of a run"):
        load_run_config(tmp_path / "config.yaml")


def test_former_keys_of_a_run_are_renamed_silently(tmp_path: Path) -> None:
    config = train_config("data=glyphs", "inner.engine=adjoint", "inner.checkpoint_every=3", "run.checkpoint_every_s=7")
    text = to_yaml(config).replace("checkpoint_every: 3", "snapshot_every: 3")
    text = text.replace("checkpoint_every_s: 7.0", "checkpoint_seconds: 7.0\n  accept: []")
    (tmp_path / "config.yaml").write_text(text)
    assert load_run_config(tmp_path / "config.yaml") == config


def test_resume_with_another_configuration_names_the_changed_keys(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(train_config("data=glyphs", "run.init_from=/a")))
    same = train_config("data=glyphs", "run.init_from=/a", "run.resume=true", "run.on_nonfinite=skip", "log.every=3")
    same = replace(same, log=replace(same.log, curvature_every=None))  # the default of earlier releases
    assert resolve_resume(same, tmp_path) == same
    other = train_config("data=glyphs", "run.resume=auto", "inner.lr=0.1", "task.ways=6")
    changed = r"inner\.lr: 0\.4 in the folder, 0\.1 now\nrun\.init_from: /a in the folder, None now\ntask\.ways"
    with pytest.raises(RunError, match=rf"(?s){changed}.*run\.init_from=/"):
        resolve_resume(other, tmp_path)


def test_resume_keeps_the_engine_that_auto_chose(tmp_path: Path) -> None:
    chosen = train_config("data=glyphs", "inner.engine=adjoint", "inner.checkpoint_every=2", "inner.task_chunk=4")
    (tmp_path / "config.yaml").write_text(to_yaml(chosen))
    auto = train_config("data=glyphs", "inner.engine=auto", "run.resume=true")
    assert resolve_resume(auto, tmp_path).inner == chosen.inner


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        resolve_resume(train_config("data=glyphs", "run.resume=true"), tmp_path)
    start = train_config("data=glyphs", "run.resume=auto")
    assert resolve_resume(start, tmp_path) == start


def test_resolved_data_is_glyphs_with_their_defaults_without_omniglot(caplog: pytest.LogCaptureFixture) -> None:
    resolved = resolve_data(train_config())
    assert resolved.data == train_config("data=glyphs").data
    assert re.search(r"NO OMNIGLOT: .* holds no Omniglot, and it cannot be downloaded", caplog.text)


def test_resolved_root_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "omniglot-py" / "images_background").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = resolve_data(train_config("data.root=.")).data
    assert isinstance(data, OmniglotConfig)
    assert data.root == str(tmp_path)


def test_data_of_a_finished_run_is_found_where_it_lies_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    omniglot = train_config().data
    assert isinstance(omniglot, OmniglotConfig)

    def root(recorded: str | None, given: str | None) -> str | None:
        data = relocate_data(replace(omniglot, root=recorded), given)
        assert isinstance(data, OmniglotConfig)
        assert data.fallback is None, "a test on other data is no test"
        return data.root

    here, gone = str(tmp_path), str(tmp_path / "gone")
    assert [root(here, None), root(gone, here), root(None, None), root(gone, None)] == [here, here, None, gone]
    monkeypatch.setenv("METALEARN_DATA", "/elsewhere")
    assert [root(gone, None), root(here, None), root(None, None)] == ["/elsewhere", here, "/elsewhere"]
    glyphs = train_config("data=glyphs").data
    assert relocate_data(glyphs, None) == glyphs
    with pytest.raises(ConfigError, match="trained on glyphs, which is embedded"):
        relocate_data(glyphs, here)


@pytest.mark.parametrize("recorded", [False, True])
def test_finished_run_is_tested_by_either_protocol(recorded: bool) -> None:
    omniglot = train_config(f"data.rotate_test={str(recorded).lower()}").data
    for asked, expected in ((None, recorded), (True, True), (False, False)):
        data = relocate_data(omniglot, None, rotate_test=asked)
        assert isinstance(data, OmniglotConfig)
        assert data.rotate_test is expected
    with pytest.raises(ConfigError, match=r"data\.rotate_test is of Omniglot, and the run was trained on glyphs"):
        relocate_data(train_config("data=glyphs").data, None, rotate_test=True)


def test_text_of_a_run_is_not_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    text = to_yaml(train_config("data=glyphs", "run.init_from=/a")).replace("/a", "${oc.env:SECRET}")
    (tmp_path / "config.yaml").write_text(text)
    assert load_run_config(tmp_path / "config.yaml").run.init_from == "${oc.env:SECRET}"


def test_folder_name_of_digits_is_text() -> None:
    assert train_config("data=glyphs", "run.init_from=2026").run.init_from == "2026"
