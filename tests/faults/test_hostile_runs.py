"""A run that a stranger made: it reads no environment, and ends in one short error that names the file."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest

import metalearn
from metalearn.config.run_config import load_run_config, to_yaml
from metalearn.core.errors import ConfigError, MetalearnError
from tests.config.factories import train_config
from tests.faults.cases import cases
from tests.inference.factories import support
from tests.training.run_folders import replace_config, untrained

SECRET = "${oc.env:SECRET}"


@functools.cache
def config_text() -> str:
    return to_yaml(train_config("data=glyphs", "run.init_from=/a"))


def config_with(init_from: str, more: str = "") -> str:
    """Return ``config.yaml`` with YAML in the place of a text, and behind all sections."""
    return config_text().replace("init_from: /a", f"init_from: {init_from}") + more


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 17))
CONFIGS = {
    "alias": (config_with("&a /a", "x: {y: *a}\n"), r"line \d+: \*a repeats another value"),
    "alias bomb": (config_with("/a", BOMB), r"line \d+: \*a0 repeats another value"),
    "alias of itself": (config_with("&a [*a]"), r"\*a repeats another value"),
    "deep lists": (config_with("[" * 3000 + "]" * 3000), "nested more than 20 deep"),
    "deep keys": (config_with("{a: " * 3000 + "}" * 3000), "nested more than 20 deep"),
    "deep blocks": (config_with("/a", "x:\n " + "- " * 3000 + "1\n"), "nested more than 20 deep"),
    "20 MB": (config_with("/a", "#" * 20_000_000), "more than 1,000,000 characters"),
    "long list": (config_with("[" + "a, " * 100_000 + "]"), "more than 20,000 keys and values"),
    "list of some length": (
        config_with("[" + "a, " * 2000 + "]"),
        r"init_from=\['a', .*\.\.\. \([\d,]+ characters\)",
    ),
    "long text": (config_with("[" + "a" * 100_000 + "]"), r"init_from=\['aaaa.*\.\.\. \([\d,]+ characters\)"),
    "many keys": (config_with("/a", "".join(f"  k{i}: 1\n" for i in range(2000))), "it has 2,004 keys in one place"),
    "many sections": (config_with("/a", "".join(f"k{i}: {{}}\n" for i in range(2000))), "it has 2,009 keys"),
    "key that is a number": (config_with("/a\n  3: 3"), "3 is the name of a key, and no text"),
    "endless integer": (config_with("0x" + "f" * 5000), "Exceeds the limit .* for integer string conversion"),
    "list as the kind of data": (
        config_with("/a").replace("name: glyphs", "name: [a]"),
        r"data\.name=\['a'\]: must be",
    ),
    "keys twice": (config_with("/a", config_with("/a")), "duplicate key task"),
    "two documents": (config_with("/a", "---\n{}\n"), "but found another document"),
    "bytes of zero": (config_with("\0"), "special characters are not allowed"),
    "environment in the place of a section": (config_with("/a", f"x: {SECRET}\n"), "it is empty, or not whole"),
    "environment as a number": (config_with("/a").replace("seed: 0", f"seed: {SECRET}"), r"seed=\$\{oc\.env:SECRET\}:"),
}


@pytest.mark.fault(
    "hostile config.yaml: aliases, nesting, 20 MB, odd keys, names of environment variables",
    "one error of at most 3 kB that names the file; nothing resolved",
)
@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    text, message = CONFIGS[name]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_run_config(tmp_path / "config.yaml")
    assert str(tmp_path / "config.yaml") in str(error.value)
    assert len(str(error.value)) < 3000
    assert "hidden" not in str(error.value)


def test_file_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    os.truncate(tmp_path / "config.yaml", 2**40)
    with pytest.raises(ConfigError, match="more than 1,000,000 characters"):
        load_run_config(tmp_path / "config.yaml")


@pytest.mark.fault("environment variables named in a stranger's config.yaml", "in no message and no file that is saved")
@pytest.mark.parametrize(
    "value", cases([SECRET, f"a {SECRET} b", "${oc.decode:${oc.env:SECRET}}", "${run.device}"], quick=[0])
)
def test_environment_of_who_loads(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    run = untrained(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    replace_config(run, text.replace("init_from: null", f"init_from: '{value}'"))
    learner = metalearn.load(run, "cpu").adapt(*support())
    saved = [learner.save(tmp_path / "weights"), learner.export(tmp_path / "model")]
    assert learner.config.run.init_from == value
    assert value.encode() in saved[0].read_bytes(), "it is kept as it was written"
    assert not any(b"hidden" in path.read_bytes() for path in saved)
    replace_config(run, text.replace("init_from: null", f"init_from: ['{value}']"))
    with pytest.raises(MetalearnError) as error:
        metalearn.load(run, "cpu")
    assert value in str(error.value)
    assert "hidden" not in str(error.value)


def test_configuration_that_could_not_be_read_again_is_not_written() -> None:
    config = train_config("data=glyphs")
    config = replace(config, run=replace(config.run, init_from="a" * 1_000_000))
    with pytest.raises(ConfigError, match=r"the configuration is too large: .*1,000,000 .*shorten data\.class_split"):
        to_yaml(config)
