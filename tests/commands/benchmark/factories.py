"""Configuration, setting and tasks shared by the benchmark's tests."""

from __future__ import annotations

import torch

from metalearn import Episodes
from metalearn.commands.benchmark.measure import MetaStep, random_episodes, random_meta_step
from metalearn.commands.benchmark.settings import MetaStepSpec, check_benchmark
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.config.compose import compose, to_dataclass

CPU = torch.device("cpu")
TINY = MetaStepSpec("5way_1shot", 3, 1, 1, tasks=2, width=4, steps=1, lr=0.1)


def config(*overrides: str) -> BenchmarkConfig:
    keys = ["data=glyphs", "data.classes=50", "bench.repeats=2", "run.device=cpu", *overrides]
    composed = to_dataclass(compose("benchmark", keys), BenchmarkConfig)
    check_benchmark(composed)
    return composed


def tiny_batches() -> list[Episodes]:
    return [random_episodes(TINY, CPU) for _ in range(3)]


def tiny_step() -> MetaStep:
    return random_meta_step(TINY, CPU)
