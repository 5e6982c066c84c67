"""What meta-steps show and cost, gathered over windows so that a GPU need not wait for the CPU at every step."""

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


class Meter:
    """Means, times and peak memory of meta-steps.

    Args:
        device: where the steps run. On CUDA the peak is the allocator's, over all steps: the data set, the parameters
            and the optimiser's state are in it. Elsewhere it is the most bytes that tensors made in a meta-step take
            at once, measured in the first, which takes longer for it and is not timed.

    ``training_s`` are the seconds of all timed steps: validation and logging do not count. ``logging_s`` are those
    spent on what is only shown: the event file, pictures, and looks at the second-order term; ``checkpoint_s`` those
    spent on putting the run's state away.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0
        self.training_s = 0.0
        self.logging_s = 0.0
        self.checkpoint_s = 0.0
        self._figures: list[Mapping[str, Tensor]] = []
        self._timed = 0
        self._window_ms: list[float] = []
        self._measured_step_ms = math.nan  # of the step whose memory was measured: only if there is no other
        self.open_window()

    @property
    def meta_step_ms(self) -> float:
        """Median over windows of the mean time of a step, sampling included; the first window warms up."""
        return median(self._window_ms[1:] or self._window_ms or [self._measured_step_ms])

    def open_window(self) -> None:
        """Start to measure; what happened since the last window closed does not count."""
        self._figures = []
        self._timed = 0
        self._passed_s = 0.0
        self.go_on()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def go_on(self) -> None:
        """Let the window's clock run on from here."""
        self._wait()
        self._opened = time.perf_counter()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one meta-step."""
        if self.device.type == "cuda" or self.peak_bytes:
            began = time.perf_counter()
            try:
                yield
            except BaseException:  # no meta-step, and no meta-step's time
                self._opened += time.perf_counter() - began
                raise
            self._timed += 1
            return
        live = PeakTensorMemory()
        with live:
            yield
        self.peak_bytes = live.peak
        self._measured_step_ms = 1000 * (time.perf_counter() - self._opened)
        self._opened = time.perf_counter()

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Around what is only shown; not within a window."""
        started = time.perf_counter()
        yield
        self.logging_s += time.perf_counter() - started

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Around putting the state away, within a window, whose clock stands still."""
        self._stand_still()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.checkpoint_s += time.perf_counter() - started
            self.go_on()

    def _stand_still(self) -> None:
        self._wait()
        now = time.perf_counter()
        self._passed_s += now - self._opened
        self._opened = now

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Note a step's figures, scalars on the device, without reading them."""
        self._figures.append(figures)

    def close_window(self) -> dict[str, float]:
        """Read the window's figures, as TensorBoard's tags and values; ``open_window`` starts the next."""
        means = {f"train/{name}": values.mean().item() for name, values in self._stacked().items()}
        self._stand_still()
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        if self._timed:
            self.training_s += self._passed_s
            self._window_ms.append(1000 * self._passed_s / self._timed)
            means["time/meta_step_ms"] = self._window_ms[-1]
        return {**means, "time/training_s": self.training_s, "memory/peak_mib": self.peak_bytes / MIB}

    def _stacked(self) -> dict[str, Tensor]:
        """The window's figures so far, ``[steps]`` each; of no step that was skipped."""
        names = self._figures[0] if self._figures else ()
        return {name: torch.stack([figures[name] for figures in self._figures]) for name in names}

    def content(self) -> dict[str, Any]:
        """What a resumed run's meter goes on from, within ``checkpoint``: the window that is open is in it."""
        return {
            "peak_bytes": self.peak_bytes,
            "training_s": self.training_s,
            "logging_s": self.logging_s,
            "checkpoint_s": self.checkpoint_s,
            "window_ms": list(self._window_ms),
            "window": {"figures": self._stacked(), "timed": self._timed, "passed_s": self._passed_s},
        }

    def restore(self, content: Mapping[str, Any]) -> None:
        """Go on from what ``content`` gave; ``go_on`` starts the clock."""
        for name in ("peak_bytes", "training_s", "logging_s", "checkpoint_s"):
            setattr(self, name, content[name])
        self._window_ms = list(content["window_ms"])
        window = content["window"]
        figures = {name: values.to(self.device).unbind() for name, values in window["figures"].items()}
        self._figures = [dict(zip(figures, step, strict=True)) for step in zip(*figures.values(), strict=True)]
        self._timed, self._passed_s = window["timed"], window["passed_s"]
