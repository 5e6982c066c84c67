"""Train MAML, validate while training, and test the best checkpoint once.

Run it as ``python scripts/train.py inner.second_order=true``; ``--help`` explains every key.
"""

from pathlib import Path

from metalearn.commands.cli import main
from metalearn.config.run_config import continued, settle_data
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import check


def follow(config: TrainConfig) -> None:
    """Be one of the other processes that torchrun has started."""
    from metalearn.training.trainer import follow

    follow(settle_data(config))


@main("train", TrainConfig, check, may_continue=lambda config: config.run.resume is not False, follow=follow)
def train(config: TrainConfig, run_dir: Path) -> None:
    """Train MAML on few-shot tasks, validate while training, and test the best checkpoint once.

    inner.second_order=true differentiates through the inner update (MAML); false does not (first-order MAML).
    """
    settled = continued(settle_data(config), run_dir)
    from metalearn.training.trainer import train  # here, so that a refused configuration need not wait for torch

    train(settled, run_dir)


if __name__ == "__main__":
    train()
