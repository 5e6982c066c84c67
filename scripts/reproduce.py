"""Reproduce a row of the published table: all seeds of an experiment, in slices of minutes if that is asked for.

Run it as ``python scripts/reproduce.py experiment_name=omniglot_5way_1shot_cpu``, and again to go on; with
``time_limit_minutes=10`` it stops after ten minutes.
"""

import sys
from pathlib import Path

from metalearn.commands.cli import command
from metalearn.commands.reproduce.plan import check_reproduce
from metalearn.config.commands_schema import ReproduceConfig


@command("reproduce", ReproduceConfig, check_reproduce, may_continue=lambda config: True)
def reproduce(config: ReproduceConfig, folder: Path) -> None:
    """Train an experiment in the orders and with the seeds that are asked for, and put it beside the published figure.

    The same command goes on with what is not finished. The exit code is 0 when all is, 1 if a run failed, and 75 if the
    time that time_limit_minutes= allows was over before. Figures lie in omniglot.json; update_reference=true also
    writes them to outputs/reference/omniglot.json and the README.
    """
    from metalearn.commands.reproduce.run import run_reproduction  # here, so that a refusal need not wait for torch

    sys.exit(run_reproduction(config, folder))


if __name__ == "__main__":
    reproduce()
