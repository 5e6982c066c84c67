"""Learned transforms of inner gradients: Meta-Curvature's numbers, and what does not fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from metalearn import InnerLoop, Params, adapt, functionalize, meta_gradient, with_transform
from metalearn.core.params import relative_error
from metalearn.inner import SGD, MetaCurvature
from metalearn.models import Conv4
from tests.factories import image_episodes
from tests.metagrad.settings import HEAD, small_mlp, vectors

TASKS = 2


def random_curvature(shape: tuple[int, ...]) -> tuple[Tensor, Params]:
    """Return a gradient ``[T, ...]`` of a parameter ``w``, and random matrices ``[...]`` for all tasks."""
    grad = torch.randn(TASKS, *shape, dtype=torch.float64)
    start = MetaCurvature().init({"w": grad[0]})
    return grad, {name: torch.randn_like(matrix) for name, matrix in start.items()}


def transformed(grad: Tensor, learned: Params) -> Tensor:
    of_tasks = {name: matrix.expand(TASKS, *matrix.shape) for name, matrix in learned.items()}
    return MetaCurvature().apply(0, {"w": grad}, of_tasks)["w"]


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2), (4, 3, 2, 3), (2, 3, 2, 2, 2)])
def test_product_is_along_each_mode(shape: tuple[int, ...]) -> None:
    grad, learned = random_curvature(shape)
    if len(shape) < 2:
        expected = grad * learned["w/scale"]
    elif len(shape) == 2:
        expected = torch.einsum("ao,bi,toi->tab", learned["w/out"], learned["w/in"], grad)
    else:
        factors = (learned[f"w/{mode}"] for mode in ("out", "in", "spatial"))
        expected = torch.einsum("ao,bi,cf,toif->tabc", *factors, grad.flatten(3)).view_as(grad)
    torch.testing.assert_close(transformed(grad, learned), expected)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (4, 3, 3, 3)])
def test_product_equals_learn2learns(shape: tuple[int, ...]) -> None:
    transforms = pytest.importorskip("learn2learn.optim.transforms", reason="learn2learn is not installed")
    grad, learned = random_curvature(shape)
    theirs = transforms.MetaCurvatureTransform(grad[0])
    # Its mc_in is of the first mode, which of torch's weights is the output; mc_out multiplies from the right.
    names = {"mc": "w/scale", "mc_in": "w/out", "mc_out": "w/in", "mc_f": "w/spatial"}
    for name, matrix in theirs.named_parameters():
        matrix.data = learned[names[name]].mT if name == "mc_out" else learned[names[name]]
    expected = torch.stack([theirs(g) for g in grad])
    torch.testing.assert_close(transformed(grad, learned), expected)


def test_product_equals_learn2learns_kronecker_transform() -> None:
    l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed")
    grad, learned = random_curvature((4, 3))
    theirs = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)(nn.Parameter(grad[0])).double()
    factors = dict(theirs.named_parameters())
    left, right = (next(p for name, p in factors.items() if name.endswith(end)) for end in ("left", "right"))
    left.data, right.data = torch.randn_like(learned["w/out"]), torch.randn_like(learned["w/in"])
    learned = {"w/out": left.mT @ left, "w/in": right.mT @ right}
    expected = torch.stack([theirs(g) for g in grad])
    torch.testing.assert_close(transformed(grad, learned), expected)


@pytest.mark.parametrize("engine", ["unroll", "checkpoint", "adjoint"])
def test_identity_is_maml(engine: str) -> None:
    forward, theta = functionalize(Conv4(3).double())
    inner = InnerLoop(lr=0.1, steps=2, engine=engine)
    curved = dataclasses.replace(inner, transform=MetaCurvature())
    episodes = image_episodes()
    expected = meta_gradient(forward, theta, episodes, inner)
    got = meta_gradient(forward, with_transform(theta, curved), episodes, curved)
    assert relative_error({name: got.grads[name] for name in theta}, expected.grads) < 1e-12
    learned = {name: g for name, g in got.grads.items() if name not in theta}
    assert sum(p.ndim == 4 for p in theta.values()) == 4
    assert all(g.abs().max() > 0 for name, g in learned.items() if name.endswith(("/out", "/in", "/spatial")))


def test_only_adapted_parameters_have_one() -> None:
    _, theta = small_mlp()
    inner = InnerLoop(lr=0.1, steps=1, adapted_params=HEAD, transform=MetaCurvature())
    learned = with_transform(theta, inner).keys() - theta.keys()
    assert learned == {f"transform::layers.4.{name}" for name in ("weight/out", "weight/in", "bias/scale")}


@dataclass(frozen=True)
class Doubled:
    """Learns nothing."""

    def init(self, params: Params) -> Params:
        return {}

    def apply(self, k: int, grads: Params, learned: Params) -> Params:
        return {name: 2 * g for name, g in grads.items()}


class NoBiases(Doubled):
    """Leaves gradients out."""

    def apply(self, k: int, grads: Params, learned: Params) -> Params:
        return {name: g for name, g in grads.items() if not name.endswith("bias")}


def test_transform_of_ones_own() -> None:
    forward, theta = small_mlp()
    episodes = vectors()
    twice = adapt(forward, theta, episodes.support_x, episodes.support_y, InnerLoop(0.2, 2, transform=Doubled()))
    expected = adapt(forward, theta, episodes.support_x, episodes.support_y, InnerLoop(0.4, 2))
    assert relative_error(twice, expected) < 1e-12


@pytest.mark.parametrize(
    ("given", "taken", "message"),
    [
        (None, MetaCurvature(), r"params\['transform::layers.1.bias/scale'\] is missing, .*with_transform"),
        (MetaCurvature(), None, r"params\['transform::layers.1.bias/scale'\] is \(6,\), and should be absent"),
        (None, NoBiases(), r"the transform NoBiases: its direction for 'layers.1.bias' is missing"),
    ],
)
def test_what_does_not_fit_raises(given: Any, taken: Any, message: str) -> None:
    forward, theta = small_mlp()
    theta = with_transform(theta, InnerLoop(0.1, 2, transform=given))
    with pytest.raises(ValueError, match=message):
        meta_gradient(forward, theta, vectors(), InnerLoop(0.1, 2, transform=taken))


class FalsyWarp(NamedTuple):
    """Is false, as every tuple without entries, and learns a matrix for each weight."""

    def init(self, params: Params) -> Params:
        return {name: torch.eye(p.shape[1]).to(p) for name, p in params.items() if p.ndim == 2}

    def apply(self, k: int, grads: Params, learned: Params) -> Params:
        return {name: g @ learned[name] if name in learned else g for name, g in grads.items()}


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("engine", ["checkpoint", "adjoint"])
def test_transform_that_is_false_is_differentiated(engine: str, second_order: bool) -> None:
    assert not FalsyWarp()
    forward, theta = small_mlp()
    inner = InnerLoop(0.1, 2, second_order=second_order, transform=FalsyWarp())
    theta, episodes = with_transform(theta, inner), vectors()
    expected = meta_gradient(forward, theta, episodes, inner).grads
    got = meta_gradient(forward, theta, episodes, dataclasses.replace(inner, engine=engine)).grads
    assert relative_error(got, expected) < 1e-12


class Averaging(Doubled):
    """Keeps the gradients of the step before."""

    def apply(self, k: int, grads: Params, learned: Params) -> Params:
        mean = {name: (g + getattr(self, "before", grads)[name]) / 2 for name, g in grads.items()}
        object.__setattr__(self, "before", grads)
        return mean


class OnCpu(Doubled):
    def init(self, params: Params) -> Params:
        return {"scale": torch.ones(1)}


class NoDictionary(Doubled):
    def apply(self, k: int, grads: Params, learned: Params) -> Any:
        return list(grads.values())


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Averaging(), r"the transform Averaging keeps 'before' on itself"),
        (OnCpu(), r"the transform OnCpu: init made 'scale' on the device cpu, and the parameters are on meta; make it"),
        (NoDictionary(), r"the transform NoDictionary: apply must return a dictionary"),
    ],
)
def test_transform_that_breaks_its_contract_raises(transform: Any, message: str) -> None:
    forward, theta = small_mlp()
    with pytest.raises((ValueError, TypeError), match=message):
        meta_gradient(forward, theta, vectors(), InnerLoop(0.1, 2, transform=transform))


@pytest.mark.parametrize("transform", [MetaCurvature, "curvature", 3, SGD()])
def test_transform_must_be_an_object(transform: Any) -> None:
    with pytest.raises(ValueError, match=r"InnerLoop: transform=.*; it must be an object with the methods init and"):
        InnerLoop(0.1, 2, transform=transform)
