"""Test the best checkpoint of a finished run again.

Run it as ``python scripts/evaluate.py run.dir=outputs/omniglot-5w1s/maml-second_order-seed0-...``.
"""

from metalearn.commands.main import evaluate

if __name__ == "__main__":
    evaluate()
