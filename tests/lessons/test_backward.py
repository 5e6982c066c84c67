"""The numbers of the lesson ``backward``, and that the lesson itself leaks nothing and changes no setting."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch

from metalearn.lessons import Lesson, backward
from tests.lessons.assertions import assert_checks

EXPECTED: dict[str, Any] = {
    "x.grad after backward on x^2 at 3": 6.0,  # 2 x
    "x.grad.requires_grad": "True",
    "second backward, x.grad = None before it": 2.0,
    "second backward, x.grad left: 6 + 2": 8.0,
    "the first derivative as it reads then": 8.0,  # x.grad is the same tensor
    "second backward, x.grad.zero_() before it": 0.0,  # the derivative of a tensor that was overwritten by zeros
    "y.backward() twice: 6 + 6, no second derivative": 12.0,
    "x after `del x`: backward(create_graph=True)": "alive",
    "x after gc.collect() as well: backward(create_graph=True)": "alive",
    "x after `del x`: backward, then x.grad = None": "freed",
    "x after `del x`: autograd.grad(create_graph=True)": "freed",
    "MiB held after 40 tensors: backward": 20.0,  # 40 tensors of 2^15 numbers of 8 bytes, and a gradient each
    "MiB held after 40 tensors: backward, then x.grad = None": 0.0,
    "MiB held after 40 tensors: autograd.grad": 0.0,
    "warnings of a cycle by backward": 1,
    "warnings of a cycle by autograd.grad": 0,
}


def test_checks(lesson: Lesson) -> None:
    assert_checks(lesson, EXPECTED)
    assert "reference cycle" in lesson.notes[0]


def test_lesson_emits_no_warnings_and_restores_settings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward.lesson()
    assert gc.isenabled()
    assert not torch.is_warn_always_enabled()


def test_lesson_leaks_nothing() -> None:
    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    backward.lesson()
    gc.collect()
    assert tensors() == before
