"""Reproduce a row of the published table: all seeds of an experiment, in slices of minutes if that is asked for.

Run it as ``python scripts/reproduce.py experiment_name=omniglot_5way_1shot_cpu``, and again to go on; with
``time_limit_minutes=10`` it stops after ten minutes.
"""

from metalearn.commands.main import reproduce

if __name__ == "__main__":
    reproduce()
