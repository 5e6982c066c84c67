"""What the benchmark's tests share: a configuration, a small setting, and a meta-step on random images."""

from __future__ import annotations

import torch

from metalearn import Episodes, InnerLoop
from metalearn.commands.benchmark.check import check_benchmark
from metalearn.commands.benchmark.measure import MetaStep
from metalearn.commands.benchmark.random_tasks import random_episodes
from metalearn.commands.benchmark.settings import MetaStepSpec
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.models import Conv4

CPU = torch.device("cpu")
TINY = MetaStepSpec("5way_1shot", 3, 1, 1, tasks=2, width=4, steps=1, lr=0.1)


def config(*overrides: str) -> BenchmarkConfig:
    given = ["data=glyphs", "data.classes=50", "bench.repeats=2", "run.device=cpu", *overrides]
    composed = to_dataclass(compose("benchmark", given), BenchmarkConfig)
    check_benchmark(composed)
    return composed


def draws(setting: MetaStepSpec = TINY) -> list[Episodes]:
    return [random_episodes(setting, CPU) for _ in range(3)]


def meta_step(setting: MetaStepSpec = TINY) -> MetaStep:
    module = Conv4(setting.ways, width=setting.width)
    return MetaStep(module, random_episodes(setting, CPU), InnerLoop(lr=setting.lr, steps=setting.steps))
