"""A comparison by ``scripts/compare.py``: two variants, two seeds, small enough for a test."""

from __future__ import annotations

from pathlib import Path

from tests.commands.process import SMALL, command

VARIANTS = {"second_order": True, "first_order": False}
SEEDS = (0, 1)
RUNS = [f"{variant}-seed{seed}" for variant in VARIANTS for seed in SEEDS]
INNER_STEPS = 2

_LONGER = f"""
inner.steps={INNER_STEPS} outer.iterations=40 eval.every=10 eval.validation_episodes=8 log.every=5
log.curvature_every=10 log.eigenvalue_every=10 compare.seeds=[{",".join(map(str, SEEDS))}] compare.steps=[1,2]
compare.repeats=2
""".split()


def write_comparison(folder: Path) -> None:
    command("compare.py", *SMALL, *_LONGER, f"hydra.run.dir={folder}", cwd=folder.parent)
