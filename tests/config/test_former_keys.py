"""Former names of keys: still accepted everywhere, with a warning that names the present one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.former_keys import RENAMED, RENAMED_IN, SHORT, rename_overrides
from metalearn.config.schema import iter_fields
from tests.config.factories import SCHEMAS, train_config, write_experiment

VALUES = {
    "run.checkpoint_seconds": "5",
    "run.memory_limit": "100 inner.engine=auto",
    "inner.snapshot_every": "2 inner.engine=adjoint",
    "inner.rule": "adam",
    "algorithm.strength": "3.5 algorithm=imaml",
    "data.unreadable": "skip data=images data.root=x",
    "compare.limit_mib": "77",
    "compare.rounds": "5",
    "bench.limit_mib": "77",
    "bench.rounds": "5",
    "unreadable": "skip run.dir=x",
    "row": "mine",
    "experiment": "mine",
    "minutes": "5 experiment_name=mine",
    "record": "true experiment_name=mine",
}
COMMANDS = {"compare": "compare", "bench": "benchmark"}
CASES = [(COMMANDS.get(key.partition(".")[0], "train"), key, present) for key, present in RENAMED.items()] + [
    (command, key, present) for command, table in RENAMED_IN.items() for key, present in table.items()
]


@pytest.mark.parametrize(("command", "former", "present"), CASES, ids=[former for _, former, _ in CASES])
def test_former_key_on_the_command_line_is_accepted_with_a_warning(command: str, former: str, present: str) -> None:
    value, *more = VALUES[former].split()
    overrides, kind = [f"{former}={value}", *more], SCHEMAS[command]
    with pytest.warns(FutureWarning, match=rf"^{former} is called {present} now"):
        former_config: Any = to_dataclass(compose(command, overrides), kind)
    present_config: Any = to_dataclass(compose(command, [f"{present}={value}", *more]), kind)
    assert former_config == present_config
    assert format(dict(iter_fields(present_config))[present]).lower() in (value, f"{value}.0")


def test_former_key_of_one_command_is_no_key_of_another() -> None:
    assert rename_overrides("train", ["row=x", "minutes=3"]) == ["row=x", "minutes=3"]


@pytest.mark.parametrize("command", SHORT)
def test_run_is_short_for_its_folder(command: str, recwarn: pytest.WarningsRecorder) -> None:
    given = ["run=omniglot-5w1s", "run.device=cpu", "++run=x"]
    assert rename_overrides(command, given) == ["run.dir=omniglot-5w1s", "run.device=cpu", "++run.dir=x"]
    assert not recwarn.list
    assert rename_overrides("train", given) == given


def test_former_key_in_an_experiment_file_is_accepted_with_a_warning(tmp_path: Path) -> None:
    write_experiment(tmp_path, "# @package _global_\ninner:\n  rule: adam\n  snapshot_every: 2\n  engine: adjoint\n")
    with pytest.warns(FutureWarning, match=r"inner\.rule is called inner\.optimizer now"):
        config = train_config("experiment=mine", config_dir=tmp_path)
    assert (config.inner.optimizer, config.inner.checkpoint_every) == ("adam", 2)


def test_command_line_counts_more_than_a_former_key_in_a_file(tmp_path: Path) -> None:
    write_experiment(tmp_path, "# @package _global_\ninner:\n  rule: adam\n")
    with pytest.warns(FutureWarning, match=r"inner\.rule"):
        config = train_config("experiment=mine", "inner.optimizer=momentum", config_dir=tmp_path)
    assert config.inner.optimizer == "momentum"


def test_present_keys_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    train_config("inner.optimizer=adam", "run.checkpoint_every_s=0")
    assert not [w for w in recwarn if w.category is FutureWarning]
