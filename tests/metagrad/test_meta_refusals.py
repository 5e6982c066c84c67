"""Meta-learned tensors go where they are meant to go, or an error says why not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from metalearn import Episodes, InnerLoop, Params, adapt, functionalize, meta_gradient, predict
from metalearn.algorithms import anil, imaml, reptile
from metalearn.core.module_parts import module_parts
from metalearn.core.params import relative_error
from metalearn.inner import PrototypeHead

INNER = InnerLoop(lr=0.3, steps=2)
X, Y = torch.randn(3, 6, 4, dtype=torch.float64), torch.arange(6).remainder(3).expand(3, 6)
TASKS = Episodes(X, Y, X + 0.1, Y)
SCALE = {"scale": torch.tensor(1.7, dtype=torch.float64)}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x) * scale))
        return out


def scaled() -> tuple[Any, Params, nn.Module]:
    torch.manual_seed(0)
    module = Scaled().double()
    return *functionalize(module), module


def decayed(prediction: Tensor, y: Tensor, decay: Tensor) -> Tensor:
    return cross_entropy(prediction, y) + decay * prediction.square().mean()


def test_initializer_sees_what_the_model_takes() -> None:
    forward, theta, _ = scaled()
    inner = dataclasses.replace(INNER, initializer=PrototypeHead("head.weight", "head.bias"))
    bound = lambda params, x: forward(params, x, **SCALE)  # noqa: E731
    want = meta_gradient(bound, theta, TASKS, inner)
    got = meta_gradient(forward, theta, TASKS, inner, meta=SCALE)
    assert relative_error(got.grads, want.grads) < 1e-12
    torch.testing.assert_close(got.loss, want.loss)


def test_parameters_that_an_initializer_adds_are_adapted() -> None:
    def forward(params: Params, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return scale * (x @ params["w"] + params["b"])

    theta = {"w": torch.randn(4, 3, dtype=torch.float64)}

    def initializer(forward: Any, fast: Params, x: Any, y: Any) -> Params:
        return {**fast, "b": fast["w"].new_zeros(3, 3)}

    inner = dataclasses.replace(INNER, initializer=initializer)
    for meta in (None, {"scale": torch.ones((), dtype=torch.float64)}):
        fast = adapt(forward, theta, X, Y, inner, meta=meta)
        assert fast["b"].abs().min() > 0


@pytest.mark.parametrize("loss", [cross_entropy, nn.CrossEntropyLoss(), lambda p, y, **more: cross_entropy(p, y)])
def test_losses_of_torch_and_any_keywords_take_none(loss: Any) -> None:
    forward, theta, _ = scaled()
    want = meta_gradient(forward, theta, TASKS, INNER, meta=SCALE)
    assert relative_error(meta_gradient(forward, theta, TASKS, INNER, loss=loss, meta=SCALE).grads, want.grads) < 1e-12
    with pytest.raises(ValueError, match=r"nothing takes 'weight'.*Functions of torch take none"):
        meta_gradient(forward, theta, TASKS, INNER, loss=loss, meta={"weight": torch.ones(3).double()})


def test_module_losses_of_ones_own_take_theirs() -> None:
    class Decayed(nn.Module):
        def forward(self, prediction: Tensor, y: Tensor, decay: Tensor) -> Tensor:
            return decayed(prediction, y, decay)

    @dataclasses.dataclass  # not hashable
    class Called:
        def __call__(self, prediction: Tensor, y: Tensor, decay: Tensor) -> Tensor:
            return decayed(prediction, y, decay)

    forward, theta, _ = scaled()
    meta = {"decay": torch.tensor(0.2, dtype=torch.float64)}
    want = meta_gradient(forward, theta, TASKS, INNER, loss=decayed, meta=meta)
    for loss in (Decayed(), Called()):
        got = meta_gradient(forward, theta, TASKS, INNER, loss=loss, meta=meta)
        assert relative_error(got.meta_grads, want.meta_grads) < 1e-12


def test_losses_are_not_kept_alive() -> None:
    import gc
    import weakref

    forward, theta, _ = scaled()

    def alive_after() -> Any:
        large = torch.zeros(9)
        loss = lambda p, y, decay: decayed(p, y, decay) + 0 * large.sum()  # noqa: E731
        meta_gradient(forward, theta, TASKS, INNER, loss=loss, meta={"decay": torch.tensor(0.2).double()})
        return weakref.ref(large)

    reference = alive_after()
    gc.collect()
    assert reference() is None


def test_one_dictionary_serves_all_calls_and_algorithms() -> None:
    forward, theta, module = scaled()
    meta = {**SCALE, "decay": torch.tensor(0.2, dtype=torch.float64)}
    fast = adapt(forward, theta, X, Y, INNER, loss=decayed, meta=meta)
    assert torch.equal(predict(forward, fast, X, meta=meta), predict(forward, fast, X, meta=SCALE))
    algorithm = anil(INNER, module_parts(module))
    result = algorithm.meta_gradient(forward, theta, TASKS, loss=decayed, query_loss=cross_entropy, meta=meta)
    want = meta_gradient(
        forward, theta, TASKS, algorithm.inner, loss=decayed, query_loss=cross_entropy, meta=meta
    ).meta_grads
    assert relative_error(result.meta_grads, want) < 1e-12
    assert all(g != 0 for g in want.values())


def test_no_gradient_raises_and_is_no_zero() -> None:
    forward, theta, module = scaled()
    parts, decay = module_parts(module), {"decay": torch.tensor(0.2, dtype=torch.float64)}
    first = dataclasses.replace(INNER, second_order=False)
    with pytest.raises(ValueError, match="the support loss alone takes 'decay', and first order has no gradient"):
        meta_gradient(forward, theta, TASKS, first, loss=decayed, query_loss=cross_entropy, meta=decay)
    assert meta_gradient(forward, theta, TASKS, first, loss=decayed, meta=decay).meta_grads["decay"] != 0
    with pytest.raises(ValueError, match=r"reptile: meta=\['scale'\]: no inner step displaces these"):
        reptile(INNER, parts).meta_gradient(forward, theta, TASKS, meta=SCALE)

    class Gain:
        def init(self, fast: Params) -> Params:
            return {}

        def update(self, k: int, grads: Params, state: Params, gain: Tensor) -> tuple[Params, Params]:
            return {name: gain.view(-1, *[1] * (g.ndim - 1)) * g for name, g in grads.items()}, state

    rule: Any = Gain()
    inner = dataclasses.replace(INNER, rule=rule)
    with pytest.raises(ValueError, match=r"implicit: the rule takes \['gain'\]"):
        imaml(inner, parts).meta_gradient(forward, theta, TASKS, meta={"gain": torch.tensor(0.5).double()})


def test_names_that_clash_raise() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x * mask)

    forward, theta = functionalize(Masked(4, 3).double())
    x = {"x": X, "mask": torch.ones_like(X)}
    with pytest.raises(ValueError, match=r"\['mask'\] are both examples and meta-learned tensors"):
        meta_gradient(forward, theta, Episodes(x, Y, x, Y), INNER, meta={"mask": torch.ones(4).double()})
    with pytest.raises(ValueError, match="'meta/w' begins with 'meta/'"):
        meta_gradient(lambda p, x: x @ p["meta/w"], {"meta/w": torch.randn(4, 3).double()}, TASKS, INNER)
    none: Any = {"x": X, "mask": None}
    with pytest.raises(TypeError, match=r"support_x\['mask'\] is None and must be a Tensor; give one, or leave it out"):
        Episodes(none, Y, none, Y)


def test_empty_meta_is_none() -> None:
    forward, theta, _ = scaled()
    result = meta_gradient(forward, theta, TASKS, INNER, meta={})
    assert result.meta_grads == {}


def test_result_that_is_a_dataclass_needs_no_earlier_call() -> None:
    @dataclasses.dataclass
    class Result:
        out: Tensor

    theta = {"w": torch.randn(4, 3, dtype=torch.float64)}
    fast = {"w": theta["w"].expand(3, 4, 3)}
    result = predict(lambda params, x: Result(x @ params["w"]), fast, X)
    torch.testing.assert_close(result.out, X @ theta["w"])


@pytest.mark.parametrize("scale", [None, -1.0, float("nan"), True, [1.0]])
def test_lr_scale_that_is_no_number_raises(scale: Any) -> None:
    forward, theta, _ = scaled()
    inner = dataclasses.replace(INNER, lr_scale=lambda k, name: scale)
    with pytest.raises(ValueError, match=r"lr_scale\(0, 'body.weight'\) is .*; it must be a number, 0 or more"):
        meta_gradient(forward, theta, TASKS, inner)


def test_settings_without_a_gradient_raise() -> None:
    forward, theta, module = scaled()
    parts = module_parts(module)
    halved = dataclasses.replace(INNER, lr_scale=lambda k, name: 0.5)
    with pytest.raises(ValueError, match=r"lr_scale.*displacement"):
        reptile(halved, parts).meta_gradient(forward, theta, TASKS)
    decays = dataclasses.replace(INNER, decoupled_weight_decay=0.5)
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        imaml(decays, parts).meta_gradient(forward, theta, TASKS)


def test_prototypes_of_absent_classes_have_probability_0() -> None:
    forward, theta, _ = scaled()
    y = torch.arange(6).remainder(2).expand(3, 6)  # of three outputs two are there
    inner = InnerLoop(lr=0.3, steps=0, initializer=PrototypeHead("head.weight", "head.bias"))
    result = meta_gradient(forward, theta, Episodes(X, y, X + 0.1, y), inner)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(3):
        support, query = (torch.tanh(x @ theta["body.weight"].T + theta["body.bias"]) for x in (X[t], X[t] + 0.1))
        means = torch.stack([support[y[t] == n].mean(dim=0) for n in range(2)])
        total += cross_entropy(-(torch.cdist(query, means) ** 2), y[t]) / 3
    torch.testing.assert_close(result.loss, total, rtol=1e-9, atol=0)
    assert all(torch.isfinite(g).all() for g in result.grads.values())
    assert mse_loss(result.predictions.softmax(-1)[..., 2], torch.zeros(3, 6).double()) == 0
