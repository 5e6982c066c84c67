"""Words of a command line that are no ``KEY=VALUE`` are explained by what was probably meant."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from metalearn.commands.mistakes import find_mistakes
from metalearn.commands.output_folders import register_resolvers
from metalearn.config.compose import compose
from metalearn.core.errors import ConfigError
from tests.config.factories import SCHEMAS

MISTAKES = [
    ("train", "--inner.second_order true", ["inner.second_order=true"]),
    ("train", "--inner.second_order=true run.seed=1", ["inner.second_order=true"]),
    ("train", "inner.second_order true", ["inner.second_order=true"]),
    ("train", "inner.second_order = true", ["inner.second_order=true"]),
    ("train", "inner.second_order =true", ["inner.second_order=true"]),
    ("train", "inner.lr= 0.1", ["inner.lr=0.1"]),
    ("train", "--epochs 3 --seed=3 lr 5", ["outer.iterations=3", "run.seed=3", "inner.lr=5"]),
    ("train", "--batch-size 4", ["task.meta_batch=4"]),
    ("train", "--algorithm anil", ["algorithm=anil"]),
    ("train", "--inner.secondorder", ["inner.second_order=VALUE"]),
    ("train", "--frobnicate", ["frobnicate=VALUE"]),
    ("train", "-m run.seed=1,2 foo", ["foo=VALUE"]),
    ("gradients", "hvp", ["lesson=hvp"]),
    ("evaluate", "outputs/x", ["run=outputs/x"]),
    ("adapt", "omniglot-5w1s support=x --query y", ["run=omniglot-5w1s", "query=y"]),
    ("adapt", "omniglot-5w1s my/support my/query", ["run=omniglot-5w1s", "support=my/support", "query=my/query"]),
    ("adapt", "run=omniglot-5w1s my/support my/query", ["support=my/support", "query=my/query"]),
    ("train", "--config mine.yaml", ["experiment=mine, of conf/experiment/"]),
    ("train", "conf/experiment/omniglot_5way_1shot.yaml", ["experiment=omniglot_5way_1shot"]),
]
CORRECT = [
    ("train", "inner.lr=0.1 ~eval.every +x=1 ++y=2 -m --cfg job -p run --config-dir here 'data.options={a: 1}'"),
    ("train", "--help --help-all --multirun hydra.run.dir=/x --info searchpath -i --version"),
    ("adapt", "run=x support=y"),
]


@pytest.mark.parametrize(("command", "line", "meant"), MISTAKES)
def test_mistake_is_explained(command: str, line: str, meant: list[str]) -> None:
    kind: Any = SCHEMAS[command]
    found = find_mistakes(command, kind, shlex.split(line))
    assert [mistake.meant for mistake in found] == meant
    assert all(mistake.words in line for mistake in found)
    assert "keys are written KEY=VALUE, without dashes and blanks. Did you mean" in str(found[0])


@pytest.mark.parametrize(("command", "line"), CORRECT)
def test_correct_words_are_no_mistakes(command: str, line: str) -> None:
    kind: Any = SCHEMAS[command]
    assert find_mistakes(command, kind, shlex.split(line)) == []


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("algorithm=MAML", "algorithm=maml"),
        ("algorithm=maml++", r"algorithm=maml_pp"),
        ("algorithm=Meta-SGD", "algorithm=meta_sgd"),
        ("algorithm=fomaml", "inner.second_order=false"),
        ("data=miniimagenet", "data=images data.root=FOLDER data.class_split=mini_imagenet"),
        ("data=mini-ImageNet", "data=images data.root=FOLDER data.class_split=mini_imagenet"),
        ("data=CIFAR-FS", "data=torchvision data.dataset=CIFAR100 data.class_split=cifar_fs"),
        ("data=cub", "data=images data.root=FOLDER"),
        ("model=conv", "model=conv4"),
        ("experiment=omniglot_5way_1shots", "experiment=omniglot_5way_1shot"),
    ],
)
def test_option_that_is_not_there_is_explained(override: str, meant: str) -> None:
    register_resolvers()
    group = override.partition("=")[0]
    with pytest.raises(ConfigError) as error:
        compose("train", [override])
    message = str(error.value)
    assert message.startswith(f"{override}: there is no such option. Did you mean {meant}? The options of {group} are ")
