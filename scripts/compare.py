"""Compare variants of a training over several seeds, by default second-order MAML with first-order MAML."""

from metalearn.commands.main import compare

if __name__ == "__main__":
    compare()
