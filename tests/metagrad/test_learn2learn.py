"""The same weights and tasks through learn2learn's MAML, Meta-SGD and ANIL, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from metalearn import InnerLoop, functionalize, meta_gradient
from metalearn.core.functional import relative_error
from metalearn.inner import lr_key, with_learned_lrs
from metalearn.metagrad import ENGINES
from metalearn.metagrad.baselines.offers import UnsupportedSettingError
from metalearn.models import MLP, Conv4
from tests.factories import image_episodes
from tests.metagrad.models import MODELS

pytestmark = pytest.mark.usefixtures("learn2learn_installed")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("model", [Conv4(3, width=6), MLP(28 * 28, 3, hidden=(16, 8))], ids=["conv4", "mlp"])
def test_equals_learn2learn(model: nn.Module, second_order: bool, steps: int, engine: str) -> None:
    from metalearn.metagrad.baselines.learn2learn import meta_gradient as learn2learn

    module = copy.deepcopy(model).double()
    episodes = image_episodes()
    inner = InnerLoop(lr=0.1, steps=steps, second_order=second_order, engine=engine)

    ours = meta_gradient(*functionalize(module), episodes, inner)
    theirs = learn2learn(module, episodes, inner)

    assert relative_error(ours.grads, theirs.grads) < 1e-9
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.support_loss, theirs.support_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.predictions, theirs.predictions)


HEADS = {"conv4": frozenset({"head.weight", "head.bias"}), "mlp": frozenset({"layers.7.weight", "layers.7.bias"})}


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("model", HEADS)
def test_meta_sgd(model: str, second_order: bool) -> None:
    from metalearn.metagrad.baselines.learn2learn import meta_gradient as learn2learn

    module, episodes = MODELS[model]().double(), image_episodes()
    forward, theta = functionalize(module)
    inner = InnerLoop(lr=0.1, steps=3, second_order=second_order, learned_lr="parameter")
    theta = {name: p + 0.05 * torch.rand_like(p) for name, p in with_learned_lrs(theta, inner).items()}

    ours = meta_gradient(forward, theta, episodes, inner).grads
    theirs = learn2learn(module, episodes, inner, params=theta).grads

    assert theirs.keys() == theta.keys()
    rates = [lr_key(name) for name, _ in module.named_parameters()]
    assert relative_error({n: theirs[n] for n in rates}, {n: ours[n] for n in rates}) < 1e-9
    assert relative_error(theirs, ours) < 1e-9


@pytest.mark.parametrize("learned_lr", [None, "parameter"])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("model", HEADS)
def test_anil(model: str, second_order: bool, learned_lr: str | None) -> None:
    from metalearn.metagrad.baselines.learn2learn import meta_gradient as learn2learn

    module, episodes = MODELS[model]().double(), image_episodes()
    forward, theta = functionalize(module)
    inner = InnerLoop(lr=0.3, steps=3, second_order=second_order, adapted=HEADS[model], learned_lr=learned_lr)
    theta = with_learned_lrs(theta, inner)

    ours = meta_gradient(forward, theta, episodes, inner)
    theirs = learn2learn(module, episodes, inner, params=theta)

    assert theirs.grads.keys() == theta.keys()
    assert relative_error(theirs.grads, ours.grads) < 1e-9
    torch.testing.assert_close(theirs.predictions, ours.predictions)
    torch.testing.assert_close(theirs.support_loss, ours.support_loss)


@pytest.mark.parametrize("adapted", [None, "head"])
@pytest.mark.parametrize("second_order", [True, False])
def test_frozen_parameters_stay_constant(second_order: bool, adapted: str | None) -> None:
    from metalearn.metagrad.baselines.learn2learn import meta_gradient as learn2learn

    module, episodes = MODELS["mlp"]().double(), image_episodes()
    head = module.get_submodule("layers.7")
    assert isinstance(head, nn.Linear)
    head.bias.requires_grad_(False)
    names = frozenset({"layers.7.weight"}) if adapted else None
    inner = InnerLoop(lr=0.1, steps=3, second_order=second_order, adapted=names)

    ours = meta_gradient(*functionalize(module), episodes, inner)
    theirs = learn2learn(module, episodes, inner)

    assert theirs.grads.keys() == ours.grads.keys()
    assert relative_error(theirs.grads, ours.grads) < 1e-9


def test_what_it_would_do_by_halves_is_refused() -> None:
    from metalearn.metagrad.baselines.learn2learn import meta_gradient as learn2learn

    module, episodes = MODELS["mlp"]().double(), image_episodes()
    with pytest.raises(UnsupportedSettingError, match=r"whole submodules, and layers\.7\.weight is part of one"):
        learn2learn(module, episodes, InnerLoop(0.1, 2, adapted=frozenset({"layers.7.weight"})))
    with pytest.raises(ValueError, match=r"adapted names heads, which params has not"):
        learn2learn(module, episodes, InnerLoop(0.1, 2, adapted=frozenset({"heads"})))

    learned = InnerLoop(0.1, 2, learned_lr="parameter")
    module.get_parameter("layers.7.bias").requires_grad_(False)
    with pytest.raises(UnsupportedSettingError, match=r"learned_lr where parameters are frozen or shared"):
        learn2learn(module, episodes, learned, params=with_learned_lrs(functionalize(module)[1], learned))
    shared = nn.Linear(28, 28)
    module = nn.Sequential(shared, nn.Tanh(), shared, nn.Flatten(), nn.Linear(28 * 28, 3)).double()
    with pytest.raises(UnsupportedSettingError, match=r"learned_lr where parameters are frozen or shared"):
        learn2learn(module, episodes, learned, params=with_learned_lrs(functionalize(module)[1], learned))
