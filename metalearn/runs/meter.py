"""What meta-steps show and cost, gathered over windows so that a GPU need not wait for the CPU at every step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from metalearn.runs.memory import MIB, LiveTensorBytes


class StepFigures(NamedTuple):
    """Of one meta-step, as scalars on the device.

    Args:
        query_loss: mean query loss after adaptation.
        query_accuracy: mean accuracy on the query sets after adaptation.
        support_loss: mean support loss before adaptation.
        grad_norm: global norm of the meta-gradient, before clipping.
    """

    query_loss: Tensor
    query_accuracy: Tensor
    support_loss: Tensor
    grad_norm: Tensor


class Meter:
    """Means, times and peak memory of meta-steps.

    Args:
        device: where the steps run. On CUDA the peak is the allocator's, over all steps. Elsewhere it is the live
            tensors' bytes in the first step, which takes longer for it; that step's window is left out of the times.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0
        self._steps: list[StepFigures] = []
        self._window_ms: list[float] = []
        self.open_window()

    @property
    def meta_step_ms(self) -> float:
        """Median over windows of the mean time of a step; the first window warms up."""
        return median(self._window_ms[1:] or self._window_ms)

    def open_window(self) -> None:
        """Start to measure; what happened since the last window closed does not count."""
        self._steps = []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._opened = time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one meta-step."""
        if self.device.type == "cuda" or self.peak_bytes:
            yield
        else:
            with LiveTensorBytes() as live:
                yield
            self.peak_bytes = live.peak

    def add(self, figures: StepFigures) -> None:
        """Note a step's figures without reading them."""
        self._steps.append(figures)

    def close_window(self) -> dict[str, float]:
        """Read the window's figures, as TensorBoard's tags and values, and open the next."""
        means = {
            f"train/{name}": torch.stack(values).mean().item()
            for name, values in zip(StepFigures._fields, zip(*self._steps, strict=True), strict=True)
        }
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        self._window_ms.append(1000 * (time.perf_counter() - self._opened) / len(self._steps))
        self.open_window()
        return {**means, "time/meta_step_ms": self._window_ms[-1], "memory/peak_mib": self.peak_bytes / MIB}
