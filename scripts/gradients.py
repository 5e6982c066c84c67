"""Run the lessons on second-order gradients, or one of them: ``python scripts/gradients.py lesson=maml``."""

import sys

try:
    from metalearn.__main__ import start
except ModuleNotFoundError as error:
    sys.exit(f"{error} in {sys.executable}: activate the environment that has it, as with `. .venv/bin/activate`.")

if __name__ == "__main__":
    start("gradients")
