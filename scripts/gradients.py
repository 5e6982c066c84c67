"""Run the lessons on second-order gradients: a claim, the code that ran, every number beside its analytic value.

Run it as ``python scripts/gradients.py``, or ``python scripts/gradients.py lesson=maml`` for one of them.
"""

from metalearn.commands.main import gradients

if __name__ == "__main__":
    gradients()
