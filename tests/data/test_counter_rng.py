"""Counter-based random numbers are uniform, with independent streams by salt, task, split and seed."""

from __future__ import annotations

import torch

from metalearn.data.counter_rng import random_keys, splitmix64, task_keys, uniform


def test_uniform_is_uniform() -> None:
    u = uniform(task_keys(0, "train", 0, 100, "cpu"), 1000, salt=1)
    assert u.dtype == torch.float64
    counts = torch.histc(u, bins=20, min=0, max=1)
    assert counts.sum() == 100_000, "all are in [0, 1]"
    chi_squared = ((counts - 5000) ** 2 / 5000).sum().item()
    assert chi_squared < 55, f"p < 3e-5 for 19 degrees of freedom: {counts.tolist()}"
    assert len(u.unique()) == u.numel()


def test_keys_do_not_depend_on_count() -> None:
    keys = task_keys(3, "test", 5, 4, "cpu")
    assert torch.equal(keys[1:], task_keys(3, "test", 6, 3, "cpu"))
    assert torch.equal(random_keys(keys, 7, salt=2)[:, :3], random_keys(keys, 3, salt=2))
    assert not (random_keys(keys, 7, salt=2) == random_keys(keys, 7, salt=1)).any()


def test_splitmix64_equals_reference() -> None:
    def reference(z: int) -> int:
        mask = 2**64 - 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    for z in (0, 1, 12345678901234567, 2**64 - 1, 0x9E3779B97F4A7C15):
        signed = z - 2**64 if z >= 2**63 else z
        assert splitmix64(torch.tensor(signed)).item() % 2**64 == reference(z)
