"""A loss that is not finite is refused at once, or where its reader asks for it, by nobody."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from metalearn.core.errors import NonFiniteLossError
from metalearn.inner.diagnostics import losses_unchecked, refuse_nonfinite

LOSSES = [torch.tensor([1.0, math.inf])]


def test_unchecked_inside_and_checked_again_outside() -> None:
    with losses_unchecked():
        refuse_nonfinite(LOSSES)
        with losses_unchecked():
            refuse_nonfinite(LOSSES)
        refuse_nonfinite(LOSSES)
    with pytest.raises(NonFiniteLossError, match="the support loss of task 1 is inf after 0 inner steps"):
        refuse_nonfinite(LOSSES)


def test_checked_again_after_an_error() -> None:
    with pytest.raises(KeyError), losses_unchecked():
        raise KeyError
    with pytest.raises(NonFiniteLossError):
        refuse_nonfinite(LOSSES)


def test_other_threads_are_checked() -> None:
    refused = []

    def check() -> None:
        try:
            refuse_nonfinite(LOSSES)
        except NonFiniteLossError as error:
            refused.append(error)

    with losses_unchecked():
        other = threading.Thread(target=check)
        other.start()
        other.join()
    assert len(refused) == 1
