"""Train MAML, validate while training, and test the best checkpoint once."""

from metalearn.commands.main import train

if __name__ == "__main__":
    train()
