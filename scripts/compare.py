"""Compare variants of a training over several seeds: by default second-order MAML with its first-order approximation.

Run it as ``python scripts/compare.py``, or with variants of your own:
``python scripts/compare.py "compare.variants=['inner.steps=1','inner.steps=5']"``.
"""

import sys
from pathlib import Path

from metalearn.commands.cli import command
from metalearn.commands.compare.variants import check_compare
from metalearn.config.commands_schema import CompareConfig


@command("compare", CompareConfig, check_compare, may_continue=lambda config: True)
def compare(config: CompareConfig, folder: Path) -> None:
    """Train every variant with every seed on the same tasks, and report accuracy, memory and time side by side.

    The same command goes on with a comparison that was interrupted. The exit code is 1 if a run failed; the report says
    why, and the others are not affected.
    """
    from metalearn.commands.compare.run import run_comparison  # here, so that a refusal need not wait for torch

    if not run_comparison(config, folder):
        sys.exit(1)


if __name__ == "__main__":
    compare()
