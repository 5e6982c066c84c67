"""Let threads of a program take turns where torch or a module keeps something once a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()  # one, as two could be taken in either order
if hasattr(os, "register_at_fork"):  # a child has no thread that could release it
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


@contextmanager
def one_thread_at_a_time() -> Iterator[None]:
    """Let other threads wait that enter this too; the same thread may enter again. Also a decorator.

    It stands around a pass with other tensors in a module, forward mode (of which torch has one level a process),
    settings of kernels, and random numbers that are drawn again later.
    """
    with _LOCK:
        yield
