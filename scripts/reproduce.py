"""Reproduce a row of the published table: ``python scripts/reproduce.py experiment_name=NAME``, again to resume."""

from metalearn.commands.main import reproduce

if __name__ == "__main__":
    reproduce()
