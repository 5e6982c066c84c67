"""Average the metrics that ``step.py`` computes, and measure times and memory of meta-steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from metalearn.core.profiling.memory import MIB, PeakTensorMemory
from metalearn.training.tracking.tags import training_tag


class Meter:
    """Means, times and peak memory of meta-steps.

    On CUDA the peak is the allocator's, over all steps: it includes the data set, the parameters and the optimizer's
    state. Elsewhere it is the most bytes that tensors made in a meta-step take at once, measured in the first, which
    takes longer for it and is not timed.

    ``training_s`` are the seconds of all timed steps, without validation and logging. ``logging_s`` are those spent on
    the event file, images and second-order diagnostics; ``checkpoint_s`` those spent on saving the state.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0
        self.training_s = 0.0
        self.logging_s = 0.0
        self.checkpoint_s = 0.0
        self._metrics: list[Mapping[str, Tensor]] = []
        self._timed_steps = 0
        self._window_ms: list[float] = []
        self._measured_step_ms = math.nan  # of the step whose memory was measured: used only if there is no other
        self.open_window()

    @property
    def meta_step_ms(self) -> float:
        """Median over windows of the mean time of a step, sampling included; the first window warms up."""
        return median(self._window_ms[1:] or self._window_ms or [self._measured_step_ms])

    def open_window(self) -> None:
        """Start a window; what happened since the last one closed does not count."""
        self._metrics = []
        self._timed_steps = 0
        self._elapsed_s = 0.0
        self.resume_clock()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def resume_clock(self) -> None:
        """Start the window's clock."""
        self._synchronize()
        self._clock_started = time.perf_counter()

    def _pause_clock(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        self._elapsed_s += now - self._clock_started
        self._clock_started = now

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def time_step(self) -> Iterator[None]:
        """Measure one meta-step."""
        if self.device.type == "cuda" or self.peak_bytes:
            started = time.perf_counter()
            try:
                yield
            except BaseException:  # the time of a failed step does not count
                self._clock_started += time.perf_counter() - started
                raise
            self._timed_steps += 1
            return
        with PeakTensorMemory() as memory:
            yield
        self.peak_bytes = memory.peak
        self._measured_step_ms = 1000 * (time.perf_counter() - self._clock_started)
        self._clock_started = time.perf_counter()

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Measure logging, between two windows."""
        started = time.perf_counter()
        yield
        self.logging_s += time.perf_counter() - started

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Measure saving the state, within a window, whose clock is paused."""
        self._pause_clock()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.checkpoint_s += time.perf_counter() - started
            self.resume_clock()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add a step's metrics, scalars on the device, without reading them."""
        self._metrics.append(metrics)

    def close_window(self) -> dict[str, float]:
        """Return the window's mean metrics by TensorBoard tag; ``open_window`` starts the next."""
        means = {training_tag(name): values.mean().item() for name, values in self._stack_metrics().items()}
        self._pause_clock()
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        if self._timed_steps:
            self.training_s += self._elapsed_s
            self._window_ms.append(1000 * self._elapsed_s / self._timed_steps)
            means["cost/meta_step_ms"] = self._window_ms[-1]
        return {**means, "cost/training_s": self.training_s, "cost/peak_mib": self.peak_bytes / MIB}

    def _stack_metrics(self) -> dict[str, Tensor]:
        """Return the window's metrics so far, ``[steps]`` each, without skipped steps."""
        names = self._metrics[0] if self._metrics else ()
        return {name: torch.stack([metrics[name] for metrics in self._metrics]) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run's meter needs, the open window included; to be called within ``checkpoint``."""
        return {
            "peak_bytes": self.peak_bytes,
            "training_s": self.training_s,
            "logging_s": self.logging_s,
            "checkpoint_s": self.checkpoint_s,
            "window_ms": list(self._window_ms),
            "window": {"figures": self._stack_metrics(), "timed": self._timed_steps, "passed_s": self._elapsed_s},
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; ``resume_clock`` starts the clock."""
        for name in ("peak_bytes", "training_s", "logging_s", "checkpoint_s"):
            setattr(self, name, content[name])
        self._window_ms = list(content["window_ms"])
        window = content["window"]
        metrics = {name: values.to(self.device).unbind() for name, values in window["figures"].items()}
        self._metrics = [dict(zip(metrics, step, strict=True)) for step in zip(*metrics.values(), strict=True)]
        self._timed_steps, self._elapsed_s = window["timed"], window["passed_s"]
