"""A user's own model, data, update rule and algorithm: trained, resumed, loaded; and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metalearn.core.errors import ConfigError, DataError, RunError
from metalearn.data.sinusoid import SinusoidSampler
from metalearn.inference.loading import load
from metalearn.training.experiment import build_experiment, build_samplers
from tests.config.factories import train_config
from tests.faults.runs import metrics_without_times
from tests.training.run_folders import run, run_interrupted

CODE = '''
from dataclasses import dataclass, replace

import torch
from torch import nn

from metalearn import Algorithm, Episodes
from metalearn.inner import state_key


class Net(nn.Module):
    def __init__(self, ways, example_shape, width=8):
        super().__init__()
        self.body, self.head = nn.Linear(example_shape.numel(), width), nn.Linear(width, ways)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))


def images(size, sparse=False, dtype=torch.uint8, ways=None):
    def split(seed, classes):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(256, (classes, 6, 1, size, size), generator=generator).to(dtype)
        return [each[: 6 - i % 2] for i, each in enumerate(x)] if sparse else x

    return {"train": split(0, 9), "validation": split(1, 5), "test": split(2, 5)}


@dataclass
class Points:
    """Regression of two numbers on three."""

    shots: int
    queries: int
    split: str
    noise: float = 0.0

    def tasks(self, first, count):
        x = torch.stack([torch.randn(self.shots + self.queries, 3, generator=torch.Generator().manual_seed(first + i))
                         for i in range(count)])
        y = x[..., :2] * (1 + self.noise)
        return Episodes(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])


@dataclass(frozen=True)
class AdaGrad:
    eps: float = 1e-3

    def init(self, fast):
        return {state_key("sum", name): torch.zeros_like(w) for name, w in fast.items()}

    def update(self, k, grads, state):
        state = {state_key("sum", name): state[state_key("sum", name)] + g * g for name, g in grads.items()}
        return {name: g / (state[state_key("sum", name)] + self.eps).sqrt() for name, g in grads.items()}, state


def anil_lslr(inner, parts, learned="layer"):
    return Algorithm("anil_lslr", replace(inner, adapted_params=frozenset(parts.head), learned_lr=learned))


class Wide(Net):
    def forward(self, x):
        return super().forward(x)[:, :3]


class Deep(Net):
    def forward(self, x):
        return self.head(x)


def text(*arguments, **more):
    return "nothing"


class Restless(Points):
    def tasks(self, first, count):
        x = torch.rand(count, 5, 3)
        y = torch.arange(5).repeat(count, 1)
        return Episodes(x, y, x, y)


class Labelled(Points):
    def tasks(self, first, count):
        x, y = torch.ones(count, 5, 3), torch.arange(5).repeat(count, 1) + 1
        return Episodes(x, y, x, y)


class Short(Labelled):
    def tasks(self, first, count):
        return super().tasks(first, 1)
'''
FEW = ["outer.iterations=2", "eval.every=1", "eval.validation_episodes=4", "eval.episodes=4", "task.meta_batch=4"]
GLYPHS, TINY = ["data=glyphs", "data.classes=50", "model=mlp", "model.hidden=[8]"], ["model=mlp", "model.hidden=[8]"]
MODEL = ["data=glyphs", "data.classes=50", "model=custom", "model.target=own_code:Net", "model.options.width=4"]
IMAGES = [*TINY, "data=custom", "data.target=own_code:images", "data.options={size: 8}"]
NUMBERS = ["data=custom", "data.target=own_code:Points", "data.regression=true", "task.shots=4"]
POINTS = [*TINY, "model.batch_norm=false", *NUMBERS]
RULE = [*GLYPHS, "inner.optimizer=custom", "inner.optimizer_target=own_code:AdaGrad", "inner.optimizer_options.eps=0.1"]
ALGORITHM = [*GLYPHS, "algorithm=custom", "algorithm.target=own_code:anil_lslr"]


@pytest.fixture(autouse=True)
def _code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_code.py").write_text(CODE)
    yield
    sys.modules.pop("own_code", None)


@pytest.mark.parametrize(
    "overrides", [MODEL, IMAGES, POINTS, RULE, ALGORITHM], ids=["model", "images", "points", "rule", "alg"]
)
def test_own_code_is_trained_resumed_and_loaded(overrides: list[str], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *FEW, *overrides)
    run_interrupted(tmp_path / "cut", 1, *FEW, *overrides)
    run(tmp_path / "cut", *FEW, *overrides, "run.resume=true")
    assert metrics_without_times(tmp_path / "cut") == metrics_without_times(tmp_path / "whole")
    expected = {"dataset": "glyphs", "algorithm": "maml"}
    expected |= {"dataset": "images"} if overrides is IMAGES else {"dataset": "Points"} if overrides is POINTS else {}
    expected |= {"algorithm": "anil_lslr"} if overrides is ALGORITHM else {}
    assert {name: whole[name] for name in expected} == expected

    with pytest.raises(ConfigError, match=r"own_code:\w+[.,] .*give metalearn\.load\(run, trust_code=True\)"):
        load(tmp_path / "whole")
    learner = load(tmp_path / "whole", trust_code=True)
    episode = build_experiment(train_config(*FEW, *overrides)).test.tasks(0, 1)
    learner.adapt(episode.support_x[0], episode.support_y[0])
    predicted = torch.tensor(learner.predict(episode.query_x[0]))
    assert predicted.shape == episode.query_y[0].shape


def test_resume_with_another_target_is_an_error(tmp_path: Path) -> None:
    run(tmp_path / "run", *FEW, *MODEL)
    for change, line in (
        ("model.target=own_code:Wide", "model.target: own_code:Net in the folder, own_code:Wide now"),
        ("model.options.width=5", "model.options.width: 4 in the folder, 5 now"),
    ):
        with pytest.raises(RunError, match=line):
            run(tmp_path / "run", *FEW, *MODEL, change, "run.resume=true")


def examples(*overrides: str) -> Tensor:
    config = train_config(*FEW, *IMAGES, *overrides)
    return build_samplers(config, torch.device("cpu"))[0].tasks(0, 2).query_x


def test_examples_by_class_may_be_bytes_or_numbers_in_tensors_or_lists() -> None:
    bytes_ = examples()
    assert bytes_.shape == (2, 15, 1, 8, 8)
    assert 0.9 < bytes_.max() <= 1
    assert examples("data.options.sparse=true").shape == bytes_.shape
    import own_code  # type: ignore[import-not-found]

    made = own_code.images(8, dtype=torch.float64)
    for form in (lambda x: x / 255, lambda x: (x / 255).numpy(), lambda x: [np.asarray(each / 255) for each in x]):
        own_code.images = lambda size, form=form: {split: form(x) for split, x in made.items()}
        torch.testing.assert_close(examples(), bytes_)


def test_sampler_class_of_the_library_is_a_data_set() -> None:
    target = "data.target=metalearn.data.sinusoid:SinusoidSampler"
    config = train_config(*FEW, *TINY, "data=custom", target, "data.regression=true")
    task = config.task
    sampler = build_samplers(config, torch.device("cpu"))[1]
    expected = SinusoidSampler(task.shots, config.eval.queries, 0, "validation")
    assert torch.equal(sampler.batch(1, 3).query_y, expected.batch(1, 3).query_y)


def data(name: str, *more: str) -> list[str]:
    return [*TINY, "data=custom", f"data.target=own_code:{name}", *more]


ERRORS: dict[str, tuple[list[str], str]] = {
    "no module": ([*MODEL, "model.target=own_code:text"], r"own_code:text: this made a str; it must be an nn\.Module"),
    "output": (
        [*MODEL, "model.target=own_code:Wide"],
        r"Wide: it returns \[2, 3\] for two .* return \[2, 5\]",
    ),
    "input": (
        [*MODEL, "model.target=own_code:Deep"],
        r"Deep: it cannot take two examples, \[2, 1, 28, 28\] \(",
    ),
    "options": ([*MODEL, "model.options.deep=3"], r"options=\{'width': 4, 'deep': 3\}: own_code:Net cannot be called"),
    "algorithm": (
        [*ALGORITHM, "algorithm.target=own_code:text"],
        r"made a str; it must be a metalearn\.Algorithm",
    ),
    "algorithm's parameters": (
        [*ALGORITHM, "algorithm.options.lr=3"],
        r"algorithm\.options=\{'lr': 3\}: .*its parameters are inner, parts, learned",
    ),
    "rule": (
        [*RULE, "inner.optimizer_target=own_code:text"],
        r"made a str without a method init; it must be",
    ),
    "no mapping": (data("text"), r"data\.target=own_code:text: this made <class 'str'>; it must be a mapping with the"),
    "differs": (data("Restless"), r"Restless, train: tasks\(0, 2\) differ from one call to the next"),
    "labels": (data("Labelled"), r"Labelled, train: labels are torch\.int64 \[2, 5\] from 1 to 5; .* from 0 to 4"),
    "number": (data("Short"), r"Short, train: tasks\(0, 2\) returned 1 tasks; it must be 2"),
    "targets": (data("Points"), r"Points, train: labels are torch\.float32 .*data\.regression=true"),
    "no targets": (
        [*IMAGES, "data.regression=true"],
        r"images, train: targets are torch\.int64 \[2, 5\]; with",
    ),
    "ways": ([*IMAGES, "task.ways=6"], r"own_code:images, validation: .*6 ways, but split 'validation' has only 5"),
    "model": ([*NUMBERS, "model=conv4"], r"model=conv4: it cannot take two examples, \[2, 3\] \("),
}


@pytest.mark.parametrize(("overrides", "message"), ERRORS.values(), ids=list(ERRORS))
def test_error_names_the_target_why_and_what_to_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_experiment(train_config(*FEW, *overrides))


def test_folder_needs_examples_that_are_images(tmp_path: Path) -> None:
    run(tmp_path / "run", *FEW, *POINTS)
    with pytest.raises(DataError, match="predicts numbers"):
        load(tmp_path / "run", trust_code=True).read(tmp_path)
