"""A loaded run adapts as the formulas say, takes what users have, keeps what it adapted, and refuses the rest."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import metalearn
from metalearn import Learner, Params, functionalize
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.core import serialization as files
from metalearn.core.errors import ConfigError, DataError, MetalearnError, RunError
from metalearn.data.glyphs import make_glyphs
from metalearn.inference.inputs import as_images
from metalearn.inference.learner import NotAdaptedError, example_shape
from metalearn.inference.weights_file import digest
from metalearn.inner import predict
from metalearn.inner.batch_norm_statistics import statistics_at, with_fixed_statistics
from metalearn.models import Conv4
from metalearn.training.checkpoints import best_path
from metalearn.training.experiment import build_experiment
from tests.training.run_folders import SINUSOID, SMALL, trained, untrained

SUPPORT, QUERY = make_glyphs(classes=7, drawings=4, seed=9).split([2, 2], dim=1)
NAMES = ["f", "e", "d", "c", "b", "a", "g"]


def support(ways: int = 5) -> tuple[Tensor, list[str]]:
    """Two images of each class, ``[2 ways, 1, 28, 28]`` uint8, and their labels, which are not in sorted order."""
    return SUPPORT[:ways].flatten(0, 1), [name for name in NAMES[:ways] for _ in range(2)]


def query(ways: int = 5) -> Tensor:
    images: Tensor = QUERY[:ways].flatten(0, 1)
    return images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "maml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each algorithm, with a checkpoint that was not trained."""
    folder = tmp_path_factory.mktemp("runs")
    names = ["anil", "boil", "meta_sgd", "reptile", "maml_pp", "imaml", "protonet", "cavia"]
    return {name: untrained(folder / name, f"algorithm={name}") for name in names}


def checkpoint(run: Path) -> Params:
    params: Params = files.load_checked(best_path(run))["params"]
    return params


def network(theta: Params) -> Conv4:
    """Conv4 with a checkpoint's parameters."""
    module = Conv4(len(theta["head.bias"]), width=8)
    module.load_state_dict({name: p for name, p in theta.items() if "::" not in name})
    return module


def scaled(images: Tensor) -> Tensor:
    floating: Tensor = images.float() / 255
    return floating


def test_maml_predicts_what_the_formulas_say(run: Path) -> None:
    images, labels = support()
    learner = metalearn.load(run, device="cpu")
    assert learner.adapt(images, labels) is learner
    module, x = network(checkpoint(run)), scaled(images)
    y = torch.tensor([sorted(NAMES[:5]).index(name) for name in labels])
    for _ in range(learner.config.inner.eval_steps):
        grads = torch.autograd.grad(cross_entropy(module(x), y), list(module.parameters()))
        with torch.no_grad():
            for p, g in zip(module.parameters(), grads, strict=True):
                p.sub_(learner.config.inner.lr * g)
    with torch.no_grad():
        alone = torch.stack([module(torch.cat([x, one[None]]))[-1] for one in scaled(query())]).softmax(dim=-1)
        together = module(scaled(query())).softmax(dim=-1)
    torch.testing.assert_close(learner.predict_proba(query()), alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(learner.predict_proba(query(), transductive=True), together, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(alone, together, atol=1e-3), "the two differ, so that each was looked at"
    assert learner.classes_ == ["b", "c", "d", "e", "f"]
    assert learner.predict(query()) == [learner.classes_[i] for i in alone.argmax(dim=-1)]
    truth = [name for name in NAMES[:5] for _ in range(2)]
    right = sum(p == t for p, t in zip(learner.predict(query()), truth, strict=True))
    assert learner.score(query(), truth) == pytest.approx(right / 10)


def prototype_logits(run: Path, ways: int) -> Tensor:
    """-|f(x) - c_n|^2 by the definition, classes in sorted order, each query in a batch of the support set and it."""
    module = network(checkpoint(run))
    module.head = nn.Identity()  # type: ignore[assignment]
    images, labels = support(ways)
    with torch.no_grad():
        embedded = module(scaled(images))
        means = torch.stack(
            [embedded[[i for i, one in enumerate(labels) if one == name]].mean(0) for name in sorted(NAMES[:ways])]
        )
        queries = torch.stack([module(torch.cat([scaled(images), one[None]]))[-1] for one in scaled(query(ways))])
    return -torch.cdist(queries, means).square()


@pytest.mark.parametrize("ways", [5, 7])
def test_protonet_predicts_by_the_nearest_mean(ways: int, runs: dict[str, Path]) -> None:
    got = metalearn.load(runs["protonet"], "cpu").adapt(*support(ways)).predict_proba(query(ways))
    torch.testing.assert_close(got, prototype_logits(runs["protonet"], ways).softmax(-1), atol=1e-5, rtol=1e-4)


def test_kept_statistics_predict_one_by_one(runs: dict[str, Path]) -> None:
    learner = metalearn.load(runs["maml_pp"], "cpu").adapt(*support())
    together, alone = learner.predict_proba(query()), learner.predict_proba(query()[:1])
    torch.testing.assert_close(together[:1], alone)
    statistics = statistics_at(checkpoint(runs["maml_pp"]), learner.steps_)
    assert statistics is not None
    state = learner._state()
    fast = {name: w[None] for name, w in state.weights.items()}
    expected = predict(with_fixed_statistics(learner.forward, statistics), fast, scaled(query())[None])[0].softmax(-1)
    torch.testing.assert_close(together, expected)


def test_steps_can_be_chosen(run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support(), steps=0)
    assert learner.steps_ == 0
    for name, w in learner._state().weights.items():
        assert torch.equal(w, checkpoint(run)[name])
    usual = metalearn.load(run, "cpu").adapt(*support())
    assert usual.steps_ == usual.config.inner.eval_steps > 0
    assert not torch.allclose(usual.predict_proba(query()), learner.predict_proba(query()), atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: x.squeeze(1),
        lambda x: scaled(x),
        lambda x: scaled(x).double().numpy()[::-1].copy()[::-1],  # a view with negative strides
        lambda x: [Image.fromarray(one[0].numpy()) for one in x],
        lambda x: list(scaled(x)),
        lambda x: scaled(x).requires_grad_(),
    ],
    ids=["uint8", "numpy", "[S, H, W]", "float", "reversed float64", "Pillow", "list of tensors", "with gradients"],
)
def test_images_of_every_kind_are_the_same_images(kind: Any, run: Path) -> None:
    images, labels = support()
    got = metalearn.load(run, "cpu").adapt(kind(images), labels).predict_proba(kind(query()))
    assert torch.equal(got, metalearn.load(run, "cpu").adapt(images, labels).predict_proba(query()))
    assert not got.requires_grad


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([3, 3, 1, 1, 2, 2, 10, 10, 0, 0], [0, 1, 2, 3, 10]),
        (torch.tensor([3, 3, 1, 1, 2, 2, 4, 4, 0, 0]), [0, 1, 2, 3, 4]),
        (list(torch.tensor([3, 3, 1, 1, 2, 2, 4, 4, 0, 0])), [0, 1, 2, 3, 4]),
        (np.array(["é", "é", "a", "a", "b", "b", "c", "c", "d", "d"]), ["a", "b", "c", "d", "é"]),
        (list(np.arange(10) // 2), [0, 1, 2, 3, 4]),
        ([(i // 2, "x") for i in range(10)], [(i, "x") for i in range(5)]),
    ],
)
def test_labels_of_every_kind(labels: Any, classes: list[Any], run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(support()[0], labels)
    assert learner.classes_ == classes
    assert [type(one) for one in learner.classes_] == [type(one) for one in classes]
    assert set(learner.predict(query())) <= set(classes)
    assert 0 <= learner.score(support()[0], labels) <= 1


IMAGES = torch.zeros(2, 1, 28, 28)
REFUSED: list[tuple[Any, Any, str]] = [
    (torch.zeros(2, 1, 32, 28), "ab", r"images are \[2, 1, 32, 28\], and the run was trained on .*\[any, 1, 28, 28\]"),
    (torch.zeros(2, 3, 28, 28), "ab", r"images are \[2, 3, 28, 28\].*Resize or convert them"),
    (np.zeros((2, 28, 28, 1)), "ab", r"Put the channels first: images\.transpose\(0, 3, 1, 2\)"),
    (torch.zeros(28, 28), "ab", r"images are \[28, 28\]"),
    (IMAGES[:0], "", r"images are \[0, 1, 28, 28\]: there is none"),
    (IMAGES + 1.5, "ab", r"images are from 1\.5 to 1\.5, and must be in \[0, 1\]: divide by 255"),
    (IMAGES - 0.5, "ab", r"images are from -0\.5 to -0\.5"),
    (IMAGES.long(), "ab", r"images are torch\.int64; give uint8"),
    (torch.stack([IMAGES[0], IMAGES[0] * torch.nan]), "ab", r"NaN or infinity, first at position 1"),
    ([np.zeros((28, 28)), np.zeros((27, 28))], "ab", r"images cannot be made one tensor"),
    (None, "ab", r"images cannot be made one tensor"),
    (IMAGES, "abc", r"3 labels for 2 images"),
    (IMAGES, [["a"], ["b"]], r"label \['a'\] is a list; a label is one hashable thing"),
    (IMAGES, ["a", 1], r"labels of several types \(int, str\) cannot be sorted"),
    (IMAGES, "aa", r"all 2 images have the label 'a'.*fewer than 2 classes"),
]


@pytest.mark.parametrize(("images", "labels", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_cannot_be_adapted_to_is_refused(images: Any, labels: Any, message: str, run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support())
    before = learner.predict_proba(query())
    with pytest.raises(DataError, match=message):
        learner.adapt(images, list(labels))
    assert torch.equal(learner.predict_proba(query()), before), "what it had learned it still knows"


def test_text_is_no_list_of_labels(run: Path) -> None:
    with pytest.raises(DataError, match=r"labels='ab': give one label an image"):
        metalearn.load(run, "cpu").adapt(IMAGES, "ab")


def test_queries_are_checked_as_well(run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support())
    with pytest.raises(DataError, match=r"images are \[1, 1, 27, 27\]"):
        learner.predict(torch.zeros(1, 1, 27, 27))
    with pytest.raises(DataError, match=r"labels 'z' are none of the 5 classes that were adapted to \('b', 'c'"):
        learner.score(query()[:2], ["b", "z"])


@pytest.mark.parametrize(
    "ask",
    [
        lambda learner: learner.predict(query()),
        lambda learner: learner.predict_proba(query()),
        lambda learner: learner.score(query(), ["a"] * 10),
        lambda learner: learner.save("x"),
        lambda learner: learner.classes_,
        lambda learner: learner.steps_,
    ],
)
def test_nothing_is_predicted_before_adapting(ask: Any, run: Path) -> None:
    learner = metalearn.load(run, "cpu")
    with pytest.raises(NotAdaptedError, match="not adapted yet: call adapt"):
        ask(learner)
    assert issubclass(NotAdaptedError, MetalearnError)
    assert not hasattr(learner, "classes_"), "as scikit-learn's estimators have it"


@pytest.mark.parametrize(
    ("name", "ways"), [("maml", 2), *((name, 7) for name in ("maml", "anil", "boil", "reptile", "imaml", "maml_pp"))]
)
def test_other_numbers_of_classes_begin_at_prototypes(
    name: str, ways: int, run: Path, runs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    learner = metalearn.load({**runs, "maml": run}[name], "cpu")
    with caplog.at_level(logging.WARNING):
        at_first = learner.adapt(*support(ways), steps=0)._state().weights
        adapted = learner.adapt(*support(ways))._state().weights
    assert f"trained for 5 classes, and these are {ways}: the head was made from the classes' mean" in caplog.text
    assert f"and {learner.config.inner.eval_steps} inner steps follow" in caplog.text
    if name != "maml_pp":  # whose Conv4 has parameters of every step
        means = at_first["head.weight"] / 2
        torch.testing.assert_close(at_first["head.bias"], -means.square().sum(dim=1))
        module = network(checkpoint({**runs, "maml": run}[name]))
        module.head = nn.Identity()  # type: ignore[assignment]
        with torch.no_grad():
            embedded = module(scaled(support(ways)[0]))
        first = [i for i, label in enumerate(support(ways)[1]) if label == learner.classes_[0]]
        torch.testing.assert_close(means[0], embedded[first].mean(dim=0), atol=1e-5, rtol=1e-4)
    changed = {n for n, w in adapted.items() if not torch.equal(w, at_first[n])}
    assert ("head.weight" in changed) == (name != "boil")
    assert ("features.0.0.weight" in changed) == (name != "anil")
    proba = learner.predict_proba(query(ways))
    assert proba.shape == (2 * ways, ways)
    torch.testing.assert_close(proba.sum(dim=1), torch.ones(2 * ways))


def test_as_many_classes_as_trained_take_the_trained_head(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        metalearn.load(run, "cpu").adapt(*support(5))
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta_sgd", r"7 classes, .* task\.ways=5: algorithm=meta_sgd has learned a step size for every entry of its"),
        ("cavia", r"the head of algorithm=cavia is shared by all tasks and never adapted"),
    ],
)
def test_algorithms_that_are_bound_to_their_classes_say_so(name: str, message: str, runs: dict[str, Path]) -> None:
    learner = metalearn.load(runs[name], "cpu")
    with pytest.raises(RunError, match=message):
        learner.adapt(*support(7))
    assert learner.adapt(*support(5)).predict_proba(query()).shape == (10, 5)


def test_a_model_without_a_head_to_be_made_is_refused(run: Path) -> None:
    learner = dataclasses.replace(metalearn.load(run, "cpu"), head=("head.weight",))
    with pytest.raises(RunError, match=r"no linear head with a bias, which other classes"):
        learner.adapt(*support(7))


@pytest.mark.parametrize(("name", "ways"), [("maml", 5), ("maml", 7), ("maml_pp", 7), ("protonet", 5), ("cavia", 5)])
def test_saved_and_restored_to_the_last_bit(
    name: str, ways: int, run: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    folder = {**runs, "maml": run}[name]
    learner = metalearn.load(folder, "cpu").adapt(*support(ways), steps=2)
    path = learner.save(tmp_path / "new" / "adapted.safetensors")
    again = metalearn.load(folder, "cpu").restore(path)
    assert (again.classes_, again.steps_) == (learner.classes_, 2)
    for transductive in (False, True):
        first, second = (one.predict_proba(query(ways), transductive=transductive) for one in (learner, again))
        assert torch.equal(first, second)
    assert {p.name for p in path.parent.iterdir()} == {path.name}


@pytest.mark.parametrize("send", [lambda learner: pickle.loads(pickle.dumps(learner)), copy.deepcopy])
def test_a_learner_can_be_sent_to_another_process_and_copied(
    send: Callable[[Learner], Learner], run: Path, runs: dict[str, Path], sinusoid: Path
) -> None:
    for folder in (run, *runs.values()):
        learner = metalearn.load(folder, "cpu").adapt(*support())
        sent = send(learner)
        assert torch.equal(sent.predict_proba(query()), learner.predict_proba(query()))
        sent.adapt(*support(), steps=2)
        assert (sent.steps_, learner.steps_) == (2, learner.config.inner.eval_steps), "it shares nothing"
        assert torch.equal(sent.predict_proba(query()), learner.adapt(*support(), steps=2).predict_proba(query()))
    inputs = torch.linspace(-5, 5, 10)
    regression = metalearn.load(sinusoid, "cpu").adapt(inputs, inputs.sin())
    assert send(regression).predict(inputs) == regression.predict(inputs)


def test_what_is_saved_says_what_it_is(run: Path, tmp_path: Path) -> None:
    path = metalearn.load(run, "cpu").adapt(support()[0], [1, 1, 0, 0, 2, 2, 3, 3, 7, 7]).save(tmp_path / "a")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("head.weight").shape == (5, 8)
    assert json.loads(metadata["classes"]) == [0, 1, 2, 3, 7]
    assert metadata["algorithm"] == "maml"
    assert metadata["steps"] == str(metalearn.load(run, "cpu").config.inner.eval_steps)
    assert metadata["run"] == str(run)


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path) -> None:
    learner, path = metalearn.load(run, "cpu").adapt(*support()), tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(RunError, match=r"a exists, and is not overwritten"):
        learner.save(path)
    assert path.read_text() == "mine"
    learner.save(path, overwrite=True)
    assert metalearn.load(run, "cpu").restore(path).classes_ == learner.classes_
    with pytest.raises(RunError, match=r"is a folder; name a file in it"):
        learner.save(tmp_path)


def test_labels_that_json_does_not_keep_are_not_saved(run: Path, tmp_path: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(support()[0], [(i // 2, 0) for i in range(10)])
    with pytest.raises(RunError, match=r"label \(0, 0\) is a tuple, and a file keeps labels that are text or whole"):
        learner.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metalearn.load(run, "cpu").adapt(*support()).save(tmp_path_factory.mktemp("saved") / "a.safetensors")


def test_weights_of_another_run_are_refused_with_what_differs(saved: Path, runs: dict[str, Path], run: Path) -> None:
    with pytest.raises(RunError, match=r"adapted from .*maml, which is another model") as error:
        metalearn.load(runs["anil"], "cpu").restore(saved)
    assert "algorithm.name: maml in the file, anil in the run" in str(error.value)
    assert "model.width" not in str(error.value)
    again = metalearn.load(run, "cpu")
    again.theta["head.bias"] += 1  # as of a run that went on to a better checkpoint
    with pytest.raises(RunError, match=r"the configuration is the same; the run was trained again"):
        again.restore(saved)


def test_damaged_weights_are_refused(saved: Path, run: Path, tmp_path: Path) -> None:
    learner, path, data = metalearn.load(run, "cpu"), tmp_path / "a", bytearray(saved.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"a is damaged: the SHA-256 in it is of other weights"):
        learner.restore(path)
    path.write_bytes(data[:-5])
    with pytest.raises(RunError, match=r"a cannot be read as a safetensors file"):
        learner.restore(path)
    with pytest.raises(RunError, match=r"b: there is no such file"):
        learner.restore(tmp_path / "b")
    path.write_bytes(safetensors.torch.save({"w": torch.zeros(1)}))
    with pytest.raises(RunError, match=r"a holds no adapted weights of metalearn"):
        learner.restore(path)
    with pytest.raises(NotAdaptedError):
        learner.predict(query())


def rewritten(saved: Path, path: Path, tensors: Params | None = None, **other: str) -> Path:
    """The file with other metadata (or weights) that agree with themselves."""
    with safetensors.safe_open(saved, framework="pt") as file:
        kept, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    kept |= tensors or {}
    path.write_bytes(safetensors.torch.save(kept, {**metadata, "content.sha256": digest(kept), **other}))
    return path


def test_weights_that_contradict_themselves_are_refused(saved: Path, run: Path, tmp_path: Path) -> None:
    learner = metalearn.load(run, "cpu")
    assert learner.restore(rewritten(saved, tmp_path / "same")).classes_ == ["b", "c", "d", "e", "f"]
    with pytest.raises(RunError, match=r"'head\.bias' is \(5,\) in it and \(2,\)"):
        learner.restore(rewritten(saved, tmp_path / "a", classes='["x", "y"]'))
    with pytest.raises(RunError, match=r"what it says of itself is not whole"):
        learner.restore(rewritten(saved, tmp_path / "b", classes="["))
    with pytest.raises(RunError, match=r"'features\.0\.0\.weight' is \(1,\) in it"):
        learner.restore(rewritten(saved, tmp_path / "c", {"features.0.0.weight": torch.zeros(1)}))


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("runs") / "sinusoid", base=SINUSOID)


def test_a_regression_predicts_numbers(sinusoid: Path, tmp_path: Path) -> None:
    x, y = np.linspace(-3, 3, 10), np.sin(np.linspace(-3, 3, 10))
    learner = metalearn.load(sinusoid, "cpu").adapt(x, y.tolist())
    theta = {name.removeprefix("layers."): p for name, p in checkpoint(sinusoid).items()}
    layers = sorted({name.split(".")[0] for name in theta})
    inputs, targets = torch.tensor(x).float()[:, None], torch.tensor(y).float()[:, None]

    def forward(w: Params, x: Tensor) -> Tensor:
        hidden = (x @ w[f"{layers[0]}.weight"].T + w[f"{layers[0]}.bias"]).relu()
        return hidden @ w[f"{layers[1]}.weight"].T + w[f"{layers[1]}.bias"]

    for _ in range(learner.steps_):
        theta = {n: p.detach().requires_grad_() for n, p in theta.items()}
        grads = torch.autograd.grad((forward(theta, inputs) - targets).square().mean(), list(theta.values()))
        steps = zip(theta.items(), grads, strict=True)
        theta = {n: p - learner.config.inner.lr * g for (n, p), g in steps}
    expected = forward(theta, torch.tensor([[0.5], [1.0]])).detach()
    got = learner.predict([0.5, 1.0])
    assert isinstance(got[0], float)
    torch.testing.assert_close(torch.tensor(got), expected.squeeze(1), atol=1e-5, rtol=1e-4)
    assert learner.score([0.5, 1.0], [0.0, 0.0]) == pytest.approx(expected.square().mean().item(), rel=1e-4)
    assert learner.classes_ == []
    again = metalearn.load(sinusoid, "cpu").restore(learner.save(tmp_path / "a"))
    assert again.predict([0.5, 1.0]) == got


def test_a_regression_refuses_what_is_none(sinusoid: Path) -> None:
    learner = metalearn.load(sinusoid, "cpu")
    with pytest.raises(DataError, match="2 targets for 3 inputs"):
        learner.adapt([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(DataError, match=r"targets hold NaN or infinity, first at position 1"):
        learner.adapt([1.0, 2.0], [1.0, float("nan")])
    with pytest.raises(DataError, match=r"targets cannot be made one tensor"):
        learner.adapt([1.0, 2.0], ["a", "b"])
    with pytest.raises(DataError, match=r"inputs are \[2, 2\]; the run was trained on single numbers"):
        learner.adapt(np.zeros((2, 2)), [1.0, 2.0])
    with pytest.raises(DataError, match=r"targets are torch\.bool"):
        learner.adapt([1.0, 2.0], [True, False])
    learner.adapt([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(RunError, match="no classes, and so no probabilities; take predict"):
        learner.predict_proba([1.0])
    with pytest.raises(DataError, match="1 targets for 2 inputs"):
        learner.score([1.0, 2.0], [1.0])


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"typo: not a run's folder, as it holds no config\.yaml"):
        metalearn.load(tmp_path / "typo")
    with pytest.raises(ConfigError, match=r"device=gpu: must be auto, cpu, cuda or cuda:N"):
        metalearn.load(run, "gpu")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(RunError, match=r"best\.pt does not exist\. The run has not reached its first validation"):
        metalearn.load(tmp_path)


def test_loading_draws_no_random_numbers(run: Path) -> None:
    before = torch.get_rng_state()
    metalearn.load(run, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_loads_without_its_data(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in "abcdefghij":
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((20, 20, 3), 20 * i, np.uint8)).save(root / name / f"{i}.png")
    images = ["data=images", f"data.root={root}", "data.size=20", "task.ways=2", "model.width=4"]
    images += ["task.queries=1", "eval.queries=1"]
    folder = untrained(tmp_path / "run", base=images)
    root.rename(tmp_path / "gone")
    learner = metalearn.load(folder, "cpu")
    assert isinstance(learner, Learner)
    with pytest.raises(DataError, match=r"Put the channels first"):
        learner.adapt(np.zeros((2, 20, 20, 3), np.uint8), ["a", "b"])
    with pytest.raises(DataError, match=r"images are \[2, 20, 20\]"):
        learner.adapt(np.zeros((2, 20, 20), np.uint8), ["a", "b"])
    learner.adapt(np.zeros((2, 3, 20, 20), np.uint8), ["a", "b"])
    assert learner.predict_proba(torch.zeros(1, 3, 20, 20)).shape == (1, 2)


@pytest.mark.parametrize("base", [SMALL, SINUSOID], ids=["glyphs", "sinusoid"])
def test_shapes_of_inputs_are_those_of_the_data(base: list[str]) -> None:
    config = to_dataclass(compose("train", base), TrainConfig)
    assert example_shape(config.data) == build_experiment(config).train.example_shape


def test_many_queries_are_predicted_in_parts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support())
    done: list[int] = []
    whole = learner.predict_proba(query())
    monkeypatch.setattr("metalearn.inference.learner._NUMBERS_PER_PASS", 28 * 28 * 11 * 3)
    torch.testing.assert_close(learner.predict_proba(query(), progress=done.append), whole)
    assert done == [3, 6, 9, 10]


def test_functionalised_model_is_the_runs(run: Path) -> None:
    forward, _ = functionalize(Conv4(5, width=8))
    theta, learner = checkpoint(run), metalearn.load(run, "cpu")
    torch.testing.assert_close(learner.forward(theta, scaled(query())), forward(theta, scaled(query())))


def test_a_folder_is_read_as_the_runs_images_were(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name, size in (("ring", 40), ("bar", 90)):
        (tmp_path / name).mkdir()
        sheet = Image.new("L", (size, size), "white")
        ImageDraw.Draw(sheet).line((10, 10, size - 10, size - 10), fill="black", width=6)
        sheet.save(tmp_path / name / "1.png")
    learner = metalearn.load(run)
    found = learner.read(tmp_path)
    assert found.classes == ["bar", "ring"]
    assert found.images.shape == (2, *learner.example_shape)
    assert found.images[:, :, 0].max() < 20, "white on black, as the run's are"
    assert "black and white are exchanged" in caplog.text
    learner.adapt(found.images, ["bar", "ring"])
    assert "borders are light" not in caplog.text.split("invert=auto")[1]
    learner.predict(255 - found.images)
    assert "these images' borders are light" in caplog.text
    with pytest.raises(DataError, match=r"names of files; give pixels, as Learner\.read"):
        learner.adapt([tmp_path / "ring" / "1.png"], ["ring"])
    with pytest.raises(DataError, match=r"For a single one give images\[None\]"):
        as_images(torch.zeros(3, 8, 8), torch.Size([3, 8, 8]))
    with pytest.raises(DataError, match="this is a file; name its folder"):
        learner.read(tmp_path / "ring" / "1.png")
