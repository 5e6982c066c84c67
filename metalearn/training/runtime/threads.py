"""``run.threads``: keep torch on the number of CPU threads at which a meta-step is fastest now.

On a machine that is busy with other work, threads wait for each other at each of a meta-step's some thousand small
operations, and one thread alone may be several times faster; on a quiet machine more threads are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from metalearn.core.profiling.hardware import num_cores, set_num_threads
from metalearn.core.text import plural

log = logging.getLogger(__name__)

_ADVANTAGE = 1.2
"""Times that another number of threads must be faster, as rounding differs between numbers, and times are noisy."""

_HOPELESS = 3.0
"""Times the fastest so far at which a number is not measured again: on a busy machine a step may take seconds."""

_REPEATS = 2


@dataclass
class ThreadTuner:
    """Chooses between one thread and as many as torch started with.

    Args:
        choices: numbers of threads to choose from; without any, nothing is measured.
    """

    choices: tuple[int, ...] = ()
    _logged: int | None = None

    @classmethod
    def create(
        cls,
        setting: int | Literal["auto"],
        device: torch.device,
        *,
        deterministic: bool,
        resumed: int | None = None,
        resumed_choices: Sequence[int] | None = None,
        processes: int = 1,
    ) -> ThreadTuner:
        """Set the number of threads that ``run.threads`` names, or choose by measurement for ``auto``.

        ``auto`` leaves torch's own number on a GPU, which does the work, and with ``run.deterministic``, as sums are
        rounded differently with another. A resumed run begins with the number of its checkpoint, ``resumed``, and has
        the choices that it had, as far as there are cores for them in each of the ``processes``, so that it computes
        the same bits; a warning says if it cannot.
        """
        most, on_cpu, cores = torch.get_num_threads(), device.type == "cpu", num_cores() // processes
        choices: Sequence[int] = (1, most) if most > 1 and not deterministic else ()
        if resumed_choices is not None:
            choices = [threads for threads in resumed_choices if threads <= cores]
        tuner = cls(tuple(choices) if setting == "auto" and on_cpu else ())
        if setting != "auto":
            set_num_threads(setting)
        elif on_cpu and resumed is not None and resumed <= cores:
            torch.set_num_threads(resumed)
        if on_cpu and resumed not in (None, torch.get_num_threads()):
            log.warning(
                "The checkpoint was written with %s, and now it is %s: sums are rounded differently, and the run does "
                "not end with the same bits (run.threads=%s keeps the number)",
                *(plural(resumed or 0, "CPU thread"), plural(torch.get_num_threads(), "thread"), resumed),
            )
        return tuner

    def tune(self, seconds_of_step: Callable[[], float]) -> None:
        """Measure a step with each number of threads, and stay at the fastest.

        Args:
            seconds_of_step: takes a step that changes nothing, with torch's present number of threads.
        """
        present, times = torch.get_num_threads(), dict[int, float]()
        numbers = dict.fromkeys((*self.choices, present))  # a resumed run may be on another than its choices
        if not self.choices or len(numbers) == 1:
            return
        if self._logged is None:
            log.info("run.threads=auto measures meta-steps; this takes some seconds beside other work")
        try:
            for threads in numbers:
                torch.set_num_threads(threads)
                first = seconds_of_step()  # starts the threads, and is slower for it
                is_hopeless = bool(times) and first > _HOPELESS * min(times.values())
                times[threads] = first if is_hopeless else min(seconds_of_step() for _ in range(_REPEATS))
        finally:
            torch.set_num_threads(present)
        best = min(times, key=times.__getitem__)
        chosen = best if times[present] > _ADVANTAGE * times[best] else present
        torch.set_num_threads(chosen)
        if chosen != self._logged:
            self._logged = chosen
            measured = ", ".join(f"{1000 * seconds:.0f} ms with {threads}" for threads, seconds in times.items())
            log.info("run.threads=auto: %d (a meta-step takes %s)", chosen, measured)
