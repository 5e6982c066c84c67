"""Adapt a trained run to images of your own, and predict others.

Run it as ``python scripts/adapt.py run.dir=RUN support=DIR query=DIR``: ``support`` holds one folder a class, ``query``
images, or one folder a class as well.
"""

from metalearn.commands.main import adapt

if __name__ == "__main__":
    adapt()
