"""Non-finite losses raise immediately, unless the caller defers the check."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from metalearn.core.errors import NonFiniteLossError
from metalearn.inner.diagnostics import check_losses_finite, defer_loss_checks

LOSSES = [torch.tensor([1.0, math.inf])]


def test_deferred_check_does_nothing_inside_and_raises_outside() -> None:
    with defer_loss_checks():
        check_losses_finite(LOSSES)
        with defer_loss_checks():
            check_losses_finite(LOSSES)
        check_losses_finite(LOSSES)
    with pytest.raises(NonFiniteLossError, match="the support loss of task 1 is inf after 0 inner steps"):
        check_losses_finite(LOSSES)


def test_check_raises_again_after_an_error() -> None:
    with pytest.raises(KeyError), defer_loss_checks():
        raise KeyError
    with pytest.raises(NonFiniteLossError):
        check_losses_finite(LOSSES)


def test_deferral_does_not_reach_other_threads() -> None:
    raised = []

    def check() -> None:
        try:
            check_losses_finite(LOSSES)
        except NonFiniteLossError as error:
            raised.append(error)

    with defer_loss_checks():
        other = threading.Thread(target=check)
        other.start()
        other.join()
    assert len(raised) == 1
