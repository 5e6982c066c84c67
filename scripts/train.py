"""Train MAML, validate while training, and test the best checkpoint once.

Run it as ``python scripts/train.py inner.second_order=true``; ``--help`` explains every key.
"""

from pathlib import Path

from metalearn.commands.cli import command
from metalearn.config.run_config import resolve_data, resolve_resume
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config


def train_worker(config: TrainConfig) -> None:
    """Be one of the other processes that torchrun has started."""
    from metalearn.training.trainer import train_worker

    train_worker(resolve_data(config))


@command(
    "train",
    TrainConfig,
    validate_train_config,
    may_continue=lambda config: config.run.resume is not False,
    follow=train_worker,
)
def train(config: TrainConfig, run_dir: Path) -> None:
    """Train MAML on few-shot tasks, validate while training, and test the best checkpoint once.

    inner.second_order=true differentiates through the inner update (MAML); false does not (first-order MAML).
    """
    settled = resolve_resume(resolve_data(config), run_dir)
    from metalearn.training.trainer import train  # here, so that a refused configuration need not wait for torch

    train(settled, run_dir)


if __name__ == "__main__":
    train()
