"""What Hydra and OmegaConf let pass, or refuse with errors that are not theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.data import metadata as catalog


@pytest.fixture(autouse=True)
def _no_omniglot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METALEARN_DATA", raising=False)
    monkeypatch.setattr(catalog, "_has_network", lambda: False)


def checked(*overrides: str, config_dir: Path | None = None) -> None:
    validate_train_config(
        to_dataclass(compose("train", overrides, str(config_dir) if config_dir else None), TrainConfig)
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("~inner", r"inner\.lr is required"),
        ("run=${inner}", r"run=InnerConfig.*: must be a section, with the keys .*seed"),
        ("run=${task.ways}", r"run=5: must be a section"),
        ("data=0", r"data=0: this cannot be composed: .*must be a string"),
        ("~experiment=1", r"deletion value must be a string.*'~experiment=1'"),
        ("+experiment@_global_=[a,1]", r"\+experiment@_global_=\[a,1\]: this cannot be composed: "),
        ("data=${task.ways}", r"data=\$\{task\.ways\}: this cannot be composed: "),
    ],
)
def test_what_is_no_section_or_option_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe#\x00", r"experiment=mine: this cannot be composed: 'utf-8' codec"),
        (b"# @package a b\ninner: {lr: 1}\n", r"experiment=mine: this cannot be composed: Too many components"),
        (b"# @package _global_\ndefaults:\n  - {a: b, c: d}\n", r"experiment/mine: Too many keys in default item"),
        (b"# @package _global_\nhydra: null\n", r"experiment=mine: this cannot be composed"),
        (b"# @package inner\ninner: [1]\n", r"inner\.inner: there is no such key \(in experiment/mine\.yaml\)"),
        (b"# @package _global_\ndefaults: [mine]\n", r"experiment=mine: this cannot be composed: .*recursion"),
        (b"false", r"experiment=mine: this cannot be composed: Invalid loaded object type: bool"),
        (b"'1'", r"experiment=mine: this cannot be composed: AssertionError"),
        (b"# @package inner\n- 1\n", r"experiment/mine'(?s:.*)list is not"),
        (b"# @package inner\n'': 1\n", r"there is no such key"),
    ],
)
def test_a_file_that_cannot_be_composed_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        checked("experiment=mine", config_dir=tmp_path)


@pytest.mark.parametrize("root", ["~nobody_by_this_name/x", "x" * 300])
def test_a_root_that_cannot_be_looked_into_is_named(root: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.root={root}: this folder cannot be looked into \("):
        checked(f"data.root='{root}'", "data.fallback=null")
    checked(f"data.root='{root}'")
