"""Random overrides and experiment files: the values that they ask for, or an error that says where the mistake is."""

from __future__ import annotations

import re
import shutil
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

import pytest
import yaml
from hypothesis import strategies as st

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import resolve_data
from metalearn.config.schema import TrainConfig, iter_fields
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.data import metadata as catalog
from tests.commands.process import words
from tests.faults.cases import cases, check_random_cases

KEYS = words("""
task task.ways task.shots task.queries inner inner.lr inner.steps inner.second_order inner.engine inner.task_chunk
outer outer.lr outer.schedule outer.clip_norm eval eval.queries eval.episodes data data.name data.root data.fallback
data.split data.rotations data.classes data.jitter model model.name model.width model.hidden model.batch_norm algorithm
run run.seed run.device run.resume run.precision run.memory_limit_mib log log.every log.images experiment
inner.second_ordr nope inner.lr.deep
""")
RIGHT = words("""
task.ways=20 task.shots=5 inner.lr=0.1 inner.steps=0 inner.second_order=false inner.engine=adjoint run.seed=7
inner.task_chunk=2 outer.clip_norm=10 outer.schedule=constant eval.queries=1 run.device=cpu run.precision=bfloat16
log.images=false log.every=1
""")
"""Valid overrides, also all together."""
VALUES = words(r"""
0 1 5 -1 1.5 1e400 1e-400 nan -inf 999999999999999999999999999999 0x1F 1_000 007 1e3 +5 true maybe null ??? '' ""
' " auto '~nobody_by_this_name/x' / . /etc/passwd/x omniglot glyphs conv4 mlp maml omniglot_5way_1shot ünï 日本 😀 \ a=b
a:b # @ %s { } [ ] ( $ ${ ~ * &a [1,2] [] [[1]] [a,1] {a:1} {} {1:2} 1,2 choice(1,2) range(1,3) glob(*) int(x)
${task.ways} ${task.shots} ${nope} ${inner} ${oc.env:HOME} ${oc.env:NOT_SET_ANYWHERE} ${run_name:} ${moment:} ${now:%Y}
${nope:1} ${oc.decode:'['} ${.} ${..} ${a${b}}
""")
VALUES += ["", "a b", "a\nb", "\t", "\0", "\udc80", "x" * 300, "!!int x"]
ODD_FORMS = words("""
+{k}={v} ++{k}={v} ~{k} ~{k}={v} {k} {k}= {k}={v}={v} {k}@x={v} {k}.a={v} {k}[0]={v} {k}:{v} --{k}={v}
+{k}@_global_={v} {k}='{v}'
""")
HEADS = ["# @package _global_\n"] * 9 + ["", "# @package inner\n", "# @package\n", "# @package a b\n"]
# fmt: off
FILES = [
    "inner: {lr: 1", "inner:\n\tlr: 1\n", "inner: &a {lr: 1, x: *a}\n", "inner: !!python/object:os.system {}\n",
    "inner: !mine {lr: 1}\n", "inner: {lr: 1, lr: 2}\n", "inner: {[1]: 2}\n", "inner: {1: 2, null: 3, true: 4}\n",
    "? {a: 1}\n: 2\n", "inner:\n  <<: {lr: 1}\n", "--- {}\n--- {}\n", "defaults: 3\n", "defaults: [nope]\n",
    "defaults: [mine]\n", "defaults:\n  - override /model: nope\n", "defaults:\n  - override /nope: mlp\n",
    "defaults:\n  - {a: b, c: d}\n", "defaults:\n  - override /model: [mlp, conv4]\n", "defaults:\n  - /model: mlp\n",
    "inner: null\n", "inner: ${task}\n", "task: ${task}\n", "task: {ways: '${task.ways}'}\n",
    "task: {ways: '${task.shots}', shots: '${task.ways}'}\n", "hydra: {run: {dir: 3}}\n", "hydra: {nope: 3}\n",
    "hydra: null\n", "model: {name: mlp}\n", "data: glyphs\n",
]
# fmt: on


@dataclass(frozen=True)
class Case:
    """Overrides, and the bytes of ``experiment/mine.yaml`` if they name it."""

    overrides: tuple[str, ...]
    file: bytes | None


def values() -> st.SearchStrategy[str]:
    some = st.sampled_from(VALUES)
    return st.one_of(some, some, some, st.integers().map(str), st.floats().map(str), st.text(max_size=20))


def overrides() -> st.SearchStrategy[str]:
    return st.builds(
        lambda key, form, value: form.replace("{k}", key).replace("{v}", value),
        st.sampled_from(KEYS),
        st.sampled_from(["{k}={v}"] * 10 + ODD_FORMS),
        values(),
    )


def files() -> st.SearchStrategy[bytes]:
    scalar = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.binary(max_size=4), values()
    )
    node = st.recursive(
        scalar,
        lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
        max_leaves=4,
    )
    tree = st.lists(st.tuples(st.sampled_from(KEYS), node), min_size=1, max_size=3).map(nested)
    dumped = st.one_of(tree, tree, tree, node).map(lambda content: yaml.dump(content, allow_unicode=True))
    body = st.one_of(dumped, dumped, dumped, st.sampled_from(FILES))
    text = st.builds(lambda head, body: (head + body).encode(errors="surrogateescape"), st.sampled_from(HEADS), body)
    other = st.one_of(st.binary(max_size=20), text.map(lambda data: data.decode("latin1").encode("utf-16")))
    return st.sampled_from([text] * 9 + [other]).flatmap(lambda kind: kind)


def nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        section, _, name = key.partition(".")
        inside = tree.get(section)
        tree[section] = {**(inside if isinstance(inside, dict) else {}), name: value} if name else value
    return tree


def configs() -> st.SearchStrategy[Case]:
    """Draw mostly valid overrides with a few random ones, sometimes with an experiment file."""
    right, random = st.sampled_from(RIGHT), overrides()
    some = st.one_of(
        st.lists(st.sampled_from([right] * 9 + [random]).flatmap(lambda kind: kind), min_size=1, max_size=4),
        st.lists(random, min_size=1, max_size=2),
    )
    return st.builds(
        lambda overrides, file: Case((*overrides, *(["experiment=mine"] if file is not None else [])), file),
        some,
        st.one_of(st.none(), st.none(), files()),
    )


def check_config(case: Case, folder: Path) -> None:
    """Compose and check: valid values of the right types, or a ``ConfigError`` that names a key or the file."""
    shutil.rmtree(folder / "experiment", ignore_errors=True)
    if case.file is not None:
        (folder / "experiment").mkdir()
        (folder / "experiment" / "mine.yaml").write_bytes(case.file)
    try:
        with mock.patch.object(catalog, "_has_network", return_value=False):
            composed = compose("train", case.overrides, str(folder) if case.file is not None else None)
            config = to_dataclass(composed, TrainConfig)
            validate_train_config(config)
            resolve_data(config)
    except ConfigError as error:
        assert_names_a_key(str(error), case)
        return
    right = dict(override.split("=") for override in case.overrides if override in RIGHT)
    for name, value in iter_fields(config):
        section, _, key = name.partition(".")
        kind = get_type_hints(type(getattr(config, section)))[key]
        assert has_type(value, kind), f"{name}={value!r} is no {kind}"
        if name in right and set(case.overrides) <= set(RIGHT):
            assert value == yaml.safe_load(right[name]), f"{name}={value!r}, and {right[name]} was asked for"


def assert_names_a_key(message: str, case: Case) -> None:
    keys = {key for key in KEYS if any(key in override for override in case.overrides)}
    if case.file is not None:
        keys |= {"mine", "YAML", *KEYS}
    parts = {part for key in keys for part in (key, key.partition(".")[0], key.rpartition(".")[2])}
    if not any(part in message for part in parts) and not (case.file and re.match(r"\S+[=:]", message)):
        raise AssertionError(f"{message}\nnames none of {sorted(parts)}")


def has_type(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(has_type(value, each) for each in arguments)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if origin is list:
        return isinstance(value, list) and all(has_type(v, arguments[0]) for v in value)
    return type(value) is kind


@pytest.mark.fault(
    "overrides and experiment files at random",
    "what was asked for, of the right types, or a `ConfigError` that names the key or the file",
    cases=20,
)
@pytest.mark.parametrize("number", cases(range(15), quick=[0]))
def test_random_configs(number: int, tmp_path: Path) -> None:
    check_random_cases(configs(), lambda case: check_config(case, tmp_path), n=20, number=number)
