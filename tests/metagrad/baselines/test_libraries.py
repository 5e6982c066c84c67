"""The same weights and tasks by torch.func, learn2learn, higher and TorchOpt, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from metalearn import InnerLoop, functionalize, meta_gradient
from metalearn.core.params import relative_error
from metalearn.inner import with_learned_lrs
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.common import Baseline, UnsupportedSettingError
from tests.factories import image_episodes
from tests.metagrad.baselines.libraries import LIBRARIES, load_library
from tests.metagrad.models import MODELS
from tests.metagrad.settings import assert_equal

HEADS = {"conv4": frozenset({"head.weight", "head.bias"}), "mlp": frozenset({"layers.7.weight", "layers.7.bias"})}


@pytest.fixture
def learn2learn() -> Baseline:
    return load_library("learn2learn")


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("model", ["conv4", "conv4 with max-pooling", "mlp"])
@pytest.mark.parametrize("name", ["torch_func", *LIBRARIES])
def test_every_engine_equals_the_library(name: str, model: str, second_order: bool, steps: int) -> None:
    module, episodes = MODELS[model]().double(), image_episodes()
    inner = InnerLoop(lr=0.1, steps=steps, second_order=second_order)
    theirs = load_library(name)(module, episodes, inner)

    for engine in ENGINES:
        ours = meta_gradient(*functionalize(module), episodes, dataclasses.replace(inner, engine=engine))
        assert_equal(ours, theirs)
    other_order = load_library(name)(module, episodes, dataclasses.replace(inner, second_order=not second_order))
    assert (relative_error(other_order.grads, theirs.grads) > 1e-3) == (steps > 0)  # by lr * H * lam, not rounding


class RowsLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x[:, 0])[0][:, -1])
        return logits


@pytest.mark.filterwarnings("error")
def test_learn2learn_clones_recurrent_layers_without_a_warning(learn2learn: Baseline) -> None:
    module, episodes, inner = RowsLSTM().double(), image_episodes(), InnerLoop(lr=0.1, steps=2)
    assert_equal(meta_gradient(*functionalize(module), episodes, inner), learn2learn(module, episodes, inner))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize(
    ("name", "frozen", "adapted"),
    [
        *[(name, "layers.1.weight", None) for name in ("torch_func", *LIBRARIES)],
        ("learn2learn", "layers.7.bias", None),
        ("learn2learn", "layers.7.bias", frozenset({"layers.7.weight"})),
    ],
)
def test_frozen_parameters_stay_constant(
    name: str, frozen: str, adapted: frozenset[str] | None, second_order: bool
) -> None:
    module, episodes = MODELS["mlp"]().double(), image_episodes()
    module.get_parameter(frozen).requires_grad_(False)
    inner = InnerLoop(lr=0.1, steps=3, second_order=second_order, adapted_params=adapted)

    ours = meta_gradient(*functionalize(module), episodes, inner)
    theirs = load_library(name)(module, episodes, inner)

    assert frozen not in theirs.grads
    assert theirs.grads.keys() == ours.grads.keys()
    assert relative_error(ours.grads, theirs.grads) < 1e-9


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", ["by_hand", *LIBRARIES])
def test_module_is_not_changed(name: str, second_order: bool) -> None:
    # In training mode this BatchNorm writes its running statistics in every forward pass.
    linear = nn.Linear(28 * 28, 3)
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(28 * 28), linear).double()
    linear.weight.grad = grad = torch.rand_like(linear.weight)
    parameters, grad_value = dict(module.named_parameters()), grad.clone()
    values = {name: value.clone() for name, value in module.state_dict().items()}

    load_library(name)(module, image_episodes(), InnerLoop(lr=0.1, steps=3, second_order=second_order))

    assert all(p is parameters[name] and p.requires_grad for name, p in module.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["2.weight"]
    assert linear.weight.grad is grad
    assert torch.equal(grad, grad_value)


@pytest.mark.parametrize(("head_alone", "learned_lr"), [(False, "parameter"), (True, "parameter"), (True, None)])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("model", HEADS)
def test_meta_sgd_and_anil_equal_learn2learn(
    model: str, second_order: bool, head_alone: bool, learned_lr: str | None, learn2learn: Baseline
) -> None:
    module, episodes = MODELS[model]().double(), image_episodes()
    forward, theta = functionalize(module)
    adapted = HEADS[model] if head_alone else None
    inner = InnerLoop(0.2, 3, second_order, adapted_params=adapted, learned_lr=learned_lr)
    theta = {name: p + 0.05 * torch.rand_like(p) for name, p in with_learned_lrs(theta, inner).items()}
    assert_equal(learn2learn(module, episodes, inner, params=theta), meta_gradient(forward, theta, episodes, inner))


def test_learn2learn_raises_for_parts_of_submodules_and_shared_parameters(learn2learn: Baseline) -> None:
    module, episodes = MODELS["mlp"]().double(), image_episodes()
    with pytest.raises(UnsupportedSettingError, match=r"whole submodules, and layers\.7\.weight is part of one"):
        learn2learn(module, episodes, InnerLoop(0.1, 2, adapted_params=frozenset({"layers.7.weight"})))
    with pytest.raises(ValueError, match=r"adapted_params names heads; the names in params are"):
        learn2learn(module, episodes, InnerLoop(0.1, 2, adapted_params=frozenset({"heads"})))

    learned = InnerLoop(0.1, 2, learned_lr="parameter")
    module.get_parameter("layers.7.bias").requires_grad_(False)
    shared = nn.Linear(28, 28)
    tied = nn.Sequential(shared, nn.Tanh(), shared, nn.Flatten(), nn.Linear(28 * 28, 3)).double()
    for each in (module, tied):
        theta = with_learned_lrs(functionalize(each)[1], learned)
        with pytest.raises(UnsupportedSettingError, match=r"learned_lr where parameters are frozen or shared"):
            learn2learn(each, episodes, learned, params=theta)
