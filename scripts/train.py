"""Train MAML, validate while training, and test the best checkpoint once."""

import sys

try:
    from metalearn.__main__ import start
except ModuleNotFoundError as error:
    sys.exit(f"{error} in {sys.executable}: activate the environment that has it, as with `. .venv/bin/activate`.")

if __name__ == "__main__":
    start("train")
