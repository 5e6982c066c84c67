"""Memory that the C library keeps for the next meta-step, instead of giving it back to the system after each.

A page that was given back is zeroed and mapped again when it is next written to. With the settings that glibc starts
with, this took up to a quarter of a second-order meta-step's time on a CPU.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
_LARGEST_INT = 2**31 - 1
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc takes no larger one
_PAD = 64 * 2**20


def configure_malloc() -> bool:
    """Have glibc keep what is freed, for the rest of this process; returns whether it does.

    Elsewhere than under glibc nothing is done. What is kept is counted as the process's resident memory.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_TRIM_THRESHOLD, _LARGEST_INT), (_TOP_PAD, _PAD))
    taken = [mallopt(name, value) for name, value in settings]
    return all(taken)
