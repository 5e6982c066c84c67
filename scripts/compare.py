"""Compare variants of a training over several seeds: by default second-order MAML with its first-order approximation.

Run it as ``python scripts/compare.py``, or with variants of your own:
``python scripts/compare.py "compare.variants=['inner.steps=1','inner.steps=5']"``.
"""

from metalearn.commands.main import compare

if __name__ == "__main__":
    compare()
