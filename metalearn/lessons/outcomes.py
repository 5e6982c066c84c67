"""What came of a computation that may raise, as a number or a word that a check can hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def value_or_error(compute: Callable[[], Tensor | None]) -> float | str:
    """The number that was computed, ``"None"``, or the name of the error that was raised instead."""
    try:
        value = compute()
    except Exception as error:  # whichever it is: what it raises is the finding
        return type(error).__name__
    return "None" if value is None else value.item()


def error_message(compute: Callable[[], object]) -> str:
    """The error that a computation raises, as ``Name: first sentence``."""
    try:
        compute()
    except Exception as error:  # as above
        return f"{type(error).__name__}: {str(error).partition('. ')[0]}"
    return "no error"


def leaf(value: float) -> Tensor:
    """A number in float64 that gradients are taken in."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)
