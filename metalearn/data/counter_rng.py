"""Counter-based random numbers: a hash of (seed, split, task, position), stateless and equal on every device.

splitmix64 (Steele, Lea & Flood 2014): key(p) = mix(key_of_the_stream + p * golden), with p = 0, 1, 2, ...
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def task_keys(seed: int, split: str, first: int, count: int, device: torch.device | str) -> Tensor:
    """Return one random int64 for each of the tasks ``first`` to ``first + count - 1``, ``[T]``."""
    start = torch.full((), seed, dtype=torch.int64, device=device)  # a copy would wait for the GPU
    stream = splitmix64(splitmix64(start) + zlib.crc32(split.encode()))
    return splitmix64(stream + _GOLDEN * torch.arange(first, first + count, device=device))


def random_keys(keys: Tensor, count: int, *, salt: int) -> Tensor:
    """Return ``count`` random int64 for every task, ``[T, count]``, depending on ``salt``."""
    positions = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    return splitmix64(splitmix64(keys + salt)[:, None] + positions)


def uniform(keys: Tensor, count: int, *, salt: int) -> Tensor:
    """Return ``count`` float64 numbers in [0, 1) for every task, ``[T, count]``: the upper 53 bits of its keys."""
    return _shift_right(random_keys(keys, count, salt=salt), 11).to(torch.float64) * 2.0**-53


def splitmix64(z: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 to int64, which wraps like unsigned integers."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift logically; torch's ``>>`` on int64 copies the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
