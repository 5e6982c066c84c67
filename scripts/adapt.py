"""Adapt a trained run to images of your own, and predict others.

Run it as ``python scripts/adapt.py run.dir=RUN support=DIR query=DIR``: ``support`` holds one folder a class, ``query``
images, or one folder a class as well.
"""

from pathlib import Path

from metalearn.commands.adapt.checks import check_adapt
from metalearn.commands.cli import command
from metalearn.config.commands_schema import AdaptConfig


@command("adapt", AdaptConfig, check_adapt)
def adapt(config: AdaptConfig, output_dir: Path) -> None:
    """Adapt the best checkpoint of a run to your own images, one folder a class, and predict others."""
    from metalearn.commands.adapt.run import run_adapt  # a refused configuration need not wait for torch

    run_adapt(config, output_dir)


if __name__ == "__main__":
    adapt()
