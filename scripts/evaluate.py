"""Test the best checkpoint of a finished run again: ``python scripts/evaluate.py run.dir=RUN``."""

from metalearn.commands.main import evaluate

if __name__ == "__main__":
    evaluate()
