"""Adapt a trained run to your own images: ``python scripts/adapt.py run.dir=RUN support=DIR query=DIR``."""

from metalearn.commands.main import adapt

if __name__ == "__main__":
    adapt()
