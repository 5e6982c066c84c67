"""Run the lessons on second-order gradients, or one of them: ``python scripts/gradients.py lesson=maml``."""

from metalearn.commands.main import gradients

if __name__ == "__main__":
    gradients()
