"""Load, adapt, predict, score, copy and read: a learner equals hand-written loops."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import metalearn
from metalearn import Learner, Params
from metalearn.core.errors import ConfigError, DataError, MetalearnError, RunError
from metalearn.inference.inputs import as_images
from metalearn.inference.learner import NotAdaptedError
from metalearn.inference.new_head import CurvatureOfNewHead
from metalearn.inner import MetaCurvature, predict
from metalearn.inner.batch_norm_statistics import statistics_at, with_fixed_statistics
from tests.inference.factories import NAMES, checkpoint, network, query, scaled, support
from tests.threads import CALLS, in_threads
from tests.training.run_folders import untrained


@torch.no_grad()
def each_query(module: nn.Module, support_x: Tensor, images: Tensor) -> Tensor:
    """Return the outputs for each query in a batch of the support set and itself."""
    return torch.stack([module(torch.cat([support_x, one[None]]))[-1] for one in scaled(images)])


def embedding(run: Path) -> nn.Module:
    module = network(checkpoint(run))
    module.head = nn.Identity()  # type: ignore[assignment]
    return module.requires_grad_(False)


@pytest.mark.parametrize("ways", [5, 3])  # fewer classes take the first outputs of the trained head
def test_maml_equals_hand_written_loop(ways: int, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, labels = support(ways)
    learner = metalearn.load(run, device="cpu")
    assert learner.adapt(images, labels) is learner
    warned = "trained for 5 classes, and these are 3: as many outputs of the trained head were taken" in caplog.text
    assert warned == (ways == 3)
    module, x = network(checkpoint(run)), scaled(images)
    module.head.weight.data, module.head.bias.data = module.head.weight.data[:ways], module.head.bias.data[:ways]
    y = torch.tensor([sorted(NAMES[:ways]).index(name) for name in labels])
    sgd = torch.optim.SGD(module.parameters(), lr=learner.config.inner.lr)
    for _ in range(learner.config.inner.eval_steps):
        sgd.zero_grad()
        cross_entropy(module(x), y).backward()
        sgd.step()
    with torch.no_grad():
        nontransductive = each_query(module, x, query(ways)).softmax(dim=-1)
        transductive = module(scaled(query(ways))).softmax(dim=-1)
    torch.testing.assert_close(learner.predict_proba(query(ways)), nontransductive, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        learner.predict_proba(query(ways), transductive=True), transductive, atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(nontransductive, transductive, atol=1e-3), "the two must differ for this test"
    assert learner.classes_ == sorted(NAMES[:ways])
    assert learner.predict(query(ways)) == [learner.classes_[i] for i in nontransductive.argmax(dim=-1)]
    truth = [name for name in NAMES[:ways] for _ in range(2)]
    right = sum(p == t for p, t in zip(learner.predict(query(ways)), truth, strict=True))
    assert learner.score(query(ways), truth) == pytest.approx(right / (2 * ways))


def test_repr_names_the_algorithm_and_the_classes(run: Path) -> None:
    learner = metalearn.load(run, device="cpu")
    assert repr(learner).endswith(f"outputs=5, model='{run.name}', algorithm='maml', classes='not adapted')")
    text = repr(learner.adapt(*support()))
    assert str(run) not in text, "a path says where somebody keeps things"
    assert text.endswith("algorithm='maml', classes=('b', 'c', 'd', 'e', 'f'))")
    assert "device=cpu" in text
    assert len(text) < 400


def prototype_logits(run: Path, ways: int) -> Tensor:
    """Return -|f(x) - c_n|^2 for sorted classes."""
    module, images = embedding(run), scaled(support(ways)[0])
    means = module(images).unflatten(0, (ways, 2)).mean(1)[sorted(range(ways), key=NAMES.__getitem__)]
    return -torch.cdist(each_query(module, images, query(ways)), means).square()


@pytest.mark.parametrize("ways", [5, 7])
def test_protonet_predicts_nearest_class_mean(ways: int, runs: dict[str, Path]) -> None:
    got = metalearn.load(runs["protonet"], "cpu").adapt(*support(ways)).predict_proba(query(ways))
    torch.testing.assert_close(got, prototype_logits(runs["protonet"], ways).softmax(-1), atol=1e-5, rtol=1e-4)


def test_running_statistics_are_used_when_tracked(runs: dict[str, Path]) -> None:
    learner = metalearn.load(runs["maml_pp"], "cpu").adapt(*support())
    batch, single = learner.predict_proba(query()), learner.predict_proba(query()[:1])
    torch.testing.assert_close(batch[:1], single)
    statistics = statistics_at(checkpoint(runs["maml_pp"]), learner.steps_)
    assert statistics is not None
    state = learner._state()
    fast = {name: w[None] for name, w in state.weights.items()}
    expected = predict(with_fixed_statistics(learner.forward, statistics), fast, scaled(query())[None])[0].softmax(-1)
    torch.testing.assert_close(batch, expected)


def test_steps_override_eval_steps(run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support(), steps=0)
    assert learner.steps_ == 0
    for name, w in learner._state().weights.items():
        assert torch.equal(w, checkpoint(run)[name])
    usual = metalearn.load(run, "cpu").adapt(*support())
    assert usual.steps_ == usual.config.inner.eval_steps > 0
    assert not torch.allclose(usual.predict_proba(query()), learner.predict_proba(query()), atol=1e-4)


def test_learner_raises_before_adapt(run: Path) -> None:
    learner = metalearn.load(run, "cpu")
    for ask in (
        lambda: learner.predict(query()),
        lambda: learner.predict_proba(query()),
        lambda: learner.score(query(), ["a"] * 10),
        lambda: learner.save("x"),
        lambda: learner.classes_,
        lambda: learner.steps_,
    ):
        with pytest.raises(NotAdaptedError, match="not adapted yet: call adapt"):
            ask()
    assert issubclass(NotAdaptedError, MetalearnError)
    assert not hasattr(learner, "classes_"), "as scikit-learn's estimators have it"


@pytest.mark.parametrize("send", [lambda learner: pickle.loads(pickle.dumps(learner)), copy.deepcopy])
def test_learner_can_be_pickled_and_copied(
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


def test_threads_that_share_a_model_get_their_own_answers(run: Path) -> None:
    learner = metalearn.load(run, "cpu")

    def answer(i: int) -> Tensor:
        return copy.copy(learner).adapt(*support(), steps=1 + i % 3).predict_proba(query())

    torch.testing.assert_close(in_threads(answer), [answer(i) for i in range(CALLS)], rtol=0, atol=0)


def test_progress_may_wait_for_another_thread(run: Path) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support())
    with ThreadPoolExecutor(1) as other:
        answers = []

        def ask_another(done: int) -> None:
            answers.append(other.submit(learner.predict, query()).result(timeout=60))

        learner.predict_proba(query(), progress=ask_another)
        learner.predict_proba(query(), transductive=True, progress=ask_another)
    assert answers[0] == answers[-1] == learner.predict(query())


def test_labels_are_those_of_the_classes_that_were_predicted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = support()
    learner = metalearn.load(run, "cpu").adapt(images, labels)
    alone, score, outputs = learner.predict(query()), learner.score(images, labels), Learner._outputs

    def and_adapted_by_another_thread(self: Learner, *args: object) -> Tensor:
        result = outputs(self, *args)  # type: ignore[arg-type]
        self.adapt(images, [f"{label} of another" for label in labels])
        return result

    monkeypatch.setattr(Learner, "_outputs", and_adapted_by_another_thread)
    assert learner.predict(query()) == alone
    learner.adapt(images, labels)
    assert learner.score(images, labels) == score


def test_regression_equals_hand_written_loop(sinusoid: Path, tmp_path: Path) -> None:
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


def test_queries_are_predicted_in_chunks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = metalearn.load(run, "cpu").adapt(*support())
    done: list[int] = []
    whole = learner.predict_proba(query())
    monkeypatch.setattr("metalearn.inference.learner._PIXELS_PER_PASS", 28 * 28 * 11 * 3)
    torch.testing.assert_close(learner.predict_proba(query(), progress=done.append), whole)
    assert done == [3, 6, 9, 10]


@pytest.mark.parametrize(
    ("name", "ways"),
    [(name, 7) for name in ("maml", "anil", "boil", "meta_curvature", "reptile", "imaml", "maml_pp")],
)
def test_head_starts_at_prototypes_when_ways_differ(
    name: str, ways: int, run: Path, runs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    learner = metalearn.load({**runs, "maml": run}[name], "cpu")
    at_first = learner.adapt(*support(ways), steps=0)._state().weights
    adapted = learner.adapt(*support(ways))._state().weights
    assert f"trained for 5 classes, and these are {ways}: the head was built from the classes' mean" in caplog.text
    assert f"and {learner.config.inner.eval_steps} inner steps follow" in caplog.text
    if name != "maml_pp":  # whose Conv4 has parameters of every step
        means = at_first["head.weight"] / 2
        torch.testing.assert_close(at_first["head.bias"], -means.square().sum(dim=1))
        embedded = embedding({**runs, "maml": run}[name])(scaled(support(ways)[0]))
        first = [i for i, label in enumerate(support(ways)[1]) if label == learner.classes_[0]]
        torch.testing.assert_close(means[0], embedded[first].mean(dim=0), atol=1e-5, rtol=1e-4)
    changed = {n for n, w in adapted.items() if not torch.equal(w, at_first[n])}
    assert ("head.weight" in changed) == (name != "boil")
    assert ("features.0.0.weight" in changed) == (name != "anil")
    proba = learner.predict_proba(query(ways))
    assert proba.shape == (2 * ways, ways)
    torch.testing.assert_close(proba.sum(dim=1), torch.ones(2 * ways))


@pytest.mark.parametrize("ways", [3, 5])
def test_learned_curvature_treats_the_classes_of_a_new_head_alike(ways: int) -> None:
    grads = {"w": torch.randn(2, ways, 4), "b": torch.randn(2, ways), "other": torch.randn(2, 3, 4)}
    start = CurvatureOfNewHead("w", "b", ways).init({name: g[0] for name, g in grads.items()})
    learned = {name: torch.randn(2, *m.shape) for name, m in start.items()}
    trained, other = learned | {"w/out": torch.randn(2, 5, 5), "b/scale": torch.randn(2, 5)}, torch.randperm(ways)
    curvature = CurvatureOfNewHead("w", "b", ways)
    got = curvature.apply(0, grads, trained)
    permuted = curvature.apply(0, grads | {"w": grads["w"][:, other], "b": grads["b"][:, other]}, trained)
    torch.testing.assert_close(permuted, got | {"w": got["w"][:, other], "b": got["b"][:, other]})
    torch.testing.assert_close(got["other"], MetaCurvature().apply(0, grads, learned)["other"])
    # What is the same for every class and every pair is kept as it is.
    symmetric = 0.3 * torch.eye(5) + 0.7 * torch.ones(5, 5)
    alike = learned | {"w/out": symmetric.expand(2, 5, 5), "b/scale": torch.full((2, 5), 1.5)}
    expected = learned | {"w/out": symmetric[:ways, :ways].expand(2, -1, -1), "b/scale": torch.full((2, ways), 1.5)}
    torch.testing.assert_close(curvature.apply(0, grads, alike), MetaCurvature().apply(0, grads, expected))


def test_trained_head_is_used_when_ways_are_equal(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    metalearn.load(run, "cpu").adapt(*support(5))
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("meta_sgd", r"7 classes, .* task\.ways=5: algorithm=meta_sgd has learned a step size for every entry of its"),
        ("cavia", r"the head of algorithm=cavia is shared by all tasks and never adapted"),
    ],
)
def test_adapt_raises_when_algorithm_fixes_ways(name: str, message: str, runs: dict[str, Path]) -> None:
    learner = metalearn.load(runs[name], "cpu")
    with pytest.raises(RunError, match=message):
        learner.adapt(*support(7))
    assert learner.adapt(*support(5)).predict_proba(query()).shape == (10, 5)


def test_adapt_raises_when_model_has_no_linear_head(run: Path) -> None:
    learner = dataclasses.replace(metalearn.load(run, "cpu"), head=("head.weight",))
    with pytest.raises(RunError, match=r"no linear head with a bias, which could be built for other classes"):
        learner.adapt(*support(7))


def test_load_draws_nothing_and_raises_when_folder_is_not_a_run(run: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    metalearn.load(run, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RunError, match=r"typo: there is no such folder of a run, and no such model"):
        metalearn.load(tmp_path / "typo")
    with pytest.raises(ConfigError, match=r"device=gpu: must be auto, cpu, cuda or cuda:N"):
        metalearn.load(run, "gpu")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(RunError, match=r"best\.pt does not exist\. The run has not reached its first validation"):
        metalearn.load(tmp_path)


def test_load_does_not_need_the_data_set(tmp_path: Path) -> None:
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


def test_read_converts_images_like_the_run(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    with pytest.raises(DataError, match=r"names of files; give pixels, such as Learner\.read"):
        learner.adapt([tmp_path / "ring" / "1.png"], ["ring"])
    with pytest.raises(DataError, match=r"For a single one give images\[None\]"):
        as_images(torch.zeros(3, 8, 8), torch.Size([3, 8, 8]))
    with pytest.raises(DataError, match="this is a file; name its folder"):
        learner.read(tmp_path / "ring" / "1.png")


def test_read_takes_former_keyword_and_warns(run: Path, tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    learner = metalearn.load(run, "cpu")
    with pytest.warns(FutureWarning, match="unreadable= is called on_unreadable= now"):
        found = learner.read(tmp_path, unreadable="skip")
    assert found.paths == learner.read(tmp_path, on_unreadable="skip").paths == [tmp_path / "a.png"]
    assert Learner.fit is Learner.adapt, "the name that scikit-learn users expect"
