"""Run the lessons on second-order gradients: a claim, the code that ran, every number beside its analytic value.

Run it as ``python scripts/gradients.py``, or ``python scripts/gradients.py lesson=maml`` for one of them.
"""

import sys
from pathlib import Path

from metalearn.commands.cli import command
from metalearn.config.commands_schema import GradientsConfig


@command("gradients", GradientsConfig)
def gradients(config: GradientsConfig, output_dir: Path) -> None:
    """Run the lessons on second-order gradients, and hold every number against its analytic value.

    The exit code is 1 if one of them is wrong. Figures, TensorBoard and lessons.json lie in the output folder.
    """
    from metalearn.commands.gradients import (
        run_lessons,  # here, so that a refused configuration need not wait for torch
    )

    if not run_lessons(config, output_dir):
        sys.exit(1)


if __name__ == "__main__":
    gradients()
