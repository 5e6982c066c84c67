"""LSTM, GRU and RNN step by step, as ``nn.LSTM`` and its relatives call them: batchable, and twice differentiable.

    LSTM:  i, f, g, o = W x + U h,   c' = sigmoid(f) c + sigmoid(i) tanh(g),   h' = sigmoid(o) tanh(c')
    GRU:   r, z = sigmoid(W x + U h),   n = tanh(W_n x + r U_n h),   h' = n + z (h - n)
    RNN:   h' = tanh(W x + U h), or relu

torch's fused kernels have no batching rule, and cuDNN's no second derivative. These are the same numbers, slower. (The
equations are those of the documentation of ``torch.nn.LSTM``, ``GRU`` and ``RNN``; projections and dropout included.)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

State = tuple[Tensor, ...]
"""``(h,)``, or ``(h, c)`` of an LSTM, each ``[batch, hidden]``."""

Cell = Callable[[Tensor, State, Sequence[Tensor], bool], State]
"""``cell(W x + b, state, weights, has_biases)``: the state after a step."""


def _lstm_cell(projected: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool) -> State:
    h, c = state
    i, f, g, o = (projected + _recur(h, weights, has_biases)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    has_projection = len(weights) == (5 if has_biases else 3)
    return (h @ weights[-1].mT if has_projection else h), c


def _gru_cell(projected: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool) -> State:
    (h,) = state
    x_r, x_z, x_n = projected.chunk(3, dim=-1)
    h_r, h_z, h_n = _recur(h, weights, has_biases).chunk(3, dim=-1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (n + torch.sigmoid(x_z + h_z) * (h - n),)


def _rnn_cell(
    activation: Callable[[Tensor], Tensor], projected: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool
) -> State:
    return (activation(projected + _recur(state[0], weights, has_biases)),)


def _recur(h: Tensor, weights: Sequence[Tensor], has_biases: bool) -> Tensor:
    return functional.linear(h, weights[1], weights[3] if has_biases else None)


_CELLS: dict[str, Cell] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": functools.partial(_rnn_cell, torch.tanh),
    "rnn_relu": functools.partial(_rnn_cell, torch.relu),
}


def _recurrent(name: str, func: Any, *args: Any) -> Any:
    """Compute a call of torch's ``lstm``, ``gru`` or ``rnn_…``: of sequences of equal lengths, or packed ones."""
    packed = isinstance(args[1], Tensor) and args[1].dtype == torch.int64
    _log_once(name.partition("_")[0].upper())
    if packed:
        x, batch_sizes, initial, weights, has_biases, layers, dropout, training, bidirectional = args
        sizes = batch_sizes.tolist()
    else:
        x, initial, weights, has_biases, layers, dropout, training, bidirectional, batch_first = args
        x = x.transpose(0, 1) if batch_first else x
        sizes = [x.shape[1]] * len(x)
        x = x.flatten(0, 1)  # as if packed
    states: Sequence[Tensor] = initial if name == "lstm" else (initial,)
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // (layers * directions)
    finals: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * per_direction : (number + 1) * per_direction]
            start = tuple(s[number] for s in states)
            output, final = _one_direction(_CELLS[name], x, sizes, start, own, has_biases, backwards=direction == 1)
            outputs.append(output)
            finals.append(final)
        x = torch.cat(outputs, dim=-1)
        if dropout and training and layer < layers - 1:
            x = functional.dropout(x, dropout)
    if not packed:
        x = x.unflatten(0, (len(sizes), -1))
        x = x.transpose(0, 1) if batch_first else x
    return x, *(torch.stack(parts) for parts in zip(*finals, strict=True))


def _one_direction(
    cell: Cell,
    x: Tensor,
    sizes: list[int],
    start: State,
    weights: Sequence[Tensor],
    has_biases: bool,
    *,
    backwards: bool,
) -> tuple[Tensor, State]:
    """Return the outputs ``[sum of sizes, hidden]`` and the last state of every sequence.

    Of the sequences, longest first, ``sizes[t]`` are longer than t steps; x has their inputs one step after another.
    """
    inputs = functional.linear(x, weights[0], weights[2] if has_biases else None).split(sizes)
    order = range(len(sizes) - 1, -1, -1) if backwards else range(len(sizes))
    state: State = tuple(s[: sizes[order[0]]].to(inputs[0].dtype) for s in start)  # under autocast it is another
    ended: list[State] = []
    outputs: list[Tensor] = []
    for t in order:
        now, size = len(state[0]), sizes[t]
        if size < now:
            ended.append(tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        elif size > now:
            state = tuple(torch.cat([s, first[now:size]]) for s, first in zip(state, start, strict=True))
        state = cell(inputs[t], state, weights, has_biases)
        outputs.append(state[0])
    final = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return torch.cat(outputs[::-1] if backwards else outputs), final


@functools.cache
def _log_once(layer: str) -> None:
    log.info("nn.%s is computed step by step, as torch's fused kernel cannot be batched over tasks.", layer)


RECURRENT = {name: functools.partial(_recurrent, name) for name in _CELLS}
"""Handlers by torch's names of the operations."""
