"""Train MAML, validate while training, and test the best checkpoint once.

Run it as ``python scripts/train.py inner.second_order=true``; ``--help`` explains every key.
"""

from metalearn.commands.main import train

if __name__ == "__main__":
    train()
