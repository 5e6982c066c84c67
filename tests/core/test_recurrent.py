"""LSTM, GRU and RNN computed step by step: torch's own numbers, and gradients by every engine."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from metalearn import Episodes, InnerLoop, functionalize, gradcheck, meta_gradient
from metalearn.core import recurrent
from metalearn.core.operations import CorrectedOperations
from metalearn.core.params import relative_error

LAYERS: dict[str, Any] = {
    "LSTM": nn.LSTM,
    "LSTM with projections": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN with relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
OPTIONS: list[dict[str, Any]] = [
    dict(zip(("num_layers", "bidirectional", "bias", "batch_first"), values, strict=True))
    for values in itertools.product((1, 2), (False, True), (False, True), (False, True))
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_states_are_those_of_torch(name: str, packed: bool) -> None:
    torch.manual_seed(0)
    for options in OPTIONS:
        layer = LAYERS[name](3, 4, **options).double()
        x: Any = torch.randn(*((5, 6) if options["batch_first"] else (6, 5)), 3, dtype=torch.float64)
        if packed:
            lengths = torch.tensor([6, 2, 4, 4, 1])
            x = pack_padded_sequence(x, lengths, batch_first=options["batch_first"], enforce_sorted=False)
        expected = layer(x)
        with CorrectedOperations():
            found = layer(x)
        if packed:
            expected, found = ((tuple(output), state) for output, state in (expected, found))
        torch.testing.assert_close(*([t for t in tree_leaves(of) if t is not None] for of in (found, expected)))


class Sentences(nn.Module):
    """Classify sequences ``[examples, 6, 3]`` by the last output of a recurrent layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = LAYERS[name](3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def model_and_tasks(name: str) -> Any:
    torch.manual_seed(0)
    module = Sentences(name)
    module(torch.zeros(1, 6, 3))  # gives the head its shape
    x, y = torch.randn(3, 4, 6, 3, dtype=torch.float64), torch.randint(3, (3, 4))
    return *functionalize(module.double()), Episodes(x, y, x, y)


@pytest.mark.parametrize("name", LAYERS)
def test_engines_agree_and_are_right(name: str, caplog: pytest.LogCaptureFixture) -> None:
    recurrent._log_once.cache_clear()
    forward, theta, tasks = model_and_tasks(name)
    with caplog.at_level(logging.INFO):
        result = meta_gradient(forward, theta, tasks, InnerLoop(0.3, 2))
    assert [record.message for record in caplog.records] == [
        f"nn.{name[:4].strip()} is computed step by step, as torch's fused kernel cannot be batched over tasks."
    ]

    def query_loss(params: Any) -> Tensor:
        return meta_gradient(forward, params, tasks, InnerLoop(0.3, 2)).loss

    assert gradcheck.directional(query_loss, theta, gradient_at_x=result.grads).error < 1e-6
    for engine in ("checkpoint", "adjoint"):
        grads = meta_gradient(forward, theta, tasks, InnerLoop(0.3, 2, engine=engine)).grads
        assert relative_error(grads, result.grads) < 1e-12


def test_dropout_between_layers_draws_a_mask_for_every_task() -> None:
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
    torch.manual_seed(0)
    with CorrectedOperations():
        x = torch.randn(1, 6, 3).expand(2, 1, 6, 3)
        first, second = torch.vmap(lambda one: layer(one)[0], randomness="different")(x)
    assert not torch.equal(first, second)
