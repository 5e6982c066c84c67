"""The same weights and tasks through learn2learn's MAML, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from metalearn import InnerLoop, functionalize, meta_gradient
from metalearn.metagrad import ENGINES
from metalearn.models import MLP, Conv4
from metalearn.params import relative_error
from tests.conftest import image_episodes

pytestmark = pytest.mark.usefixtures("learn2learn_installed")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("model", [Conv4(3, width=6), MLP(28 * 28, 3, hidden=(16, 8))], ids=["conv4", "mlp"])
def test_equals_learn2learn(model: nn.Module, second_order: bool, steps: int, engine: str) -> None:
    from metalearn.peers.learn2learn import meta_gradient as learn2learn

    module = copy.deepcopy(model).double()
    episodes = image_episodes()
    inner = InnerLoop(lr=0.1, steps=steps, second_order=second_order, engine=engine)

    ours = meta_gradient(*functionalize(module), episodes, inner)
    theirs = learn2learn(module, episodes, inner)

    assert relative_error(ours.grads, theirs.grads) < 1e-9
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.support_loss, theirs.support_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.predictions, theirs.predictions)
