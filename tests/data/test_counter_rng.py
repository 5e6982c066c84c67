"""Random numbers that are a hash: uniform, and another stream for every salt, task, split and seed."""

from __future__ import annotations

import torch

from metalearn.data.counter_rng import random_keys, task_keys, uniform


def test_uniform_numbers_fill_the_interval_evenly() -> None:
    u = uniform(task_keys(0, "train", 0, 100, "cpu"), 1000, salt=1)
    assert u.dtype == torch.float64
    counts = torch.histc(u, bins=20, min=0, max=1)
    assert counts.sum() == 100_000, "all are in [0, 1]"
    chi_squared = ((counts - 5000) ** 2 / 5000).sum().item()
    assert chi_squared < 55, f"p < 3e-5 for 19 degrees of freedom: {counts.tolist()}"
    assert len(u.unique()) == u.numel()


def test_keys_do_not_depend_on_how_many_are_asked_for() -> None:
    of_tasks = task_keys(3, "test", 5, 4, "cpu")
    assert torch.equal(of_tasks[1:], task_keys(3, "test", 6, 3, "cpu"))
    assert torch.equal(random_keys(of_tasks, 7, salt=2)[:, :3], random_keys(of_tasks, 3, salt=2))
    assert not (random_keys(of_tasks, 7, salt=2) == random_keys(of_tasks, 7, salt=1)).any()
