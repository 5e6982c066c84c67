"""Calls of a function in threads that change places as often as Python can."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS, CALLS = 4, 12


def in_threads(function: Callable[[int], Any]) -> list[Any]:
    """Return the function's result for each call's number, from 0 to 11; the threads begin together."""
    start = threading.Barrier(THREADS)

    def calls(thread: int) -> list[Any]:
        start.wait()
        return [function(i) for i in range(thread, CALLS, THREADS)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 10)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(calls, range(THREADS)))
    finally:
        sys.setswitchinterval(interval)
    return [results[i % THREADS][i // THREADS] for i in range(CALLS)]
