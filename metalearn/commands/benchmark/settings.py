"""What is timed beside other libraries, what float32 is judged on, and along what cost grows. No torch, no Hydra."""

from __future__ import annotations

from dataclasses import dataclass, replace

from metalearn.commands.benchmark.engine_settings import TaskSpec


@dataclass(frozen=True)
class MetaStepSpec(TaskSpec):
    """One meta-step.

    Args:
        steps: K, the number of inner steps.
        lr: their size.
    """

    steps: int
    lr: float

    @property
    def title(self) -> str:
        """In words."""
        return f"{super().title}, K={self.steps}"


SETTINGS = (
    MetaStepSpec("5way_1shot", 5, 1, 1, 32, 64, steps=1, lr=0.4),
    MetaStepSpec("20way_1shot", 20, 1, 1, 16, 64, steps=5, lr=0.1),
    MetaStepSpec("5way_1shot_15queries", 5, 1, 15, 16, 64, steps=5, lr=0.4),
)
"""Those of the published table."""

FLOAT32_SETTINGS = (
    MetaStepSpec("5way_K1", 5, 1, 1, 1, 64, steps=1, lr=0.4),
    MetaStepSpec("5way_K5", 5, 1, 1, 1, 64, steps=5, lr=0.4),
    MetaStepSpec("20way_K1", 20, 1, 1, 1, 64, steps=1, lr=0.1),
    MetaStepSpec("20way_K5", 20, 1, 1, 1, 64, steps=5, lr=0.1),
)
"""Those at which float32 is held against float64, on one task a draw: of many tasks one is always near a kink."""


@dataclass(frozen=True)
class Sweep:
    """Settings that differ in one number.

    Args:
        name: the field of ``MetaStepSpec`` that differs; for files.
        axis: what that is, for plots.
        base: where the other numbers are taken from.
        values: of that field.
    """

    name: str
    axis: str
    base: MetaStepSpec
    values: tuple[int, ...]

    def settings(self) -> list[MetaStepSpec]:
        """A setting for each value."""
        return [_with(self.base, self.name, value) for value in self.values]


def _with(base: MetaStepSpec, name: str, value: int) -> MetaStepSpec:
    changed: dict[str, int] = {name: value}
    return replace(base, name=f"{name}={value}", **changed)


BASE = MetaStepSpec("base", 5, 1, 1, 8, 64, steps=1, lr=0.4)
SWEEPS = (
    Sweep("steps", "inner steps K", BASE, (1, 2, 5, 10)),
    Sweep("tasks", "tasks T of a meta-step", BASE, (4, 8, 16, 32)),
    Sweep("ways", "ways N", BASE, (5, 10, 20)),
    Sweep("width", "filters of every convolution", BASE, (16, 32, 64, 128)),
)
