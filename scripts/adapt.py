"""Adapt a trained run to your own images: ``python scripts/adapt.py run.dir=RUN support=DIR query=DIR``."""

import sys

try:
    from metalearn.__main__ import start
except ModuleNotFoundError as error:
    sys.exit(f"{error} in {sys.executable}: activate the environment that has it, as with `. .venv/bin/activate`.")

if __name__ == "__main__":
    start("adapt")
