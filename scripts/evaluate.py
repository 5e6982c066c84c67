"""Test the best checkpoint of a finished run again.

Run it as ``python scripts/evaluate.py run.dir=outputs/omniglot-5w1s/maml-second_order-seed0-...``.
"""

import dataclasses
from pathlib import Path

from metalearn.commands.cli import command
from metalearn.config.commands_schema import EvaluateConfig
from metalearn.config.run_config import load_run_config, relocate_data
from metalearn.config.validation import validate_evaluate_config, validate_train_config


@command("evaluate", EvaluateConfig, validate_evaluate_config)
def evaluate(config: EvaluateConfig, output_dir: Path) -> None:
    """Test the best checkpoint of a run again, on the tasks of test classes that the run itself was tested on."""
    run_dir = Path(config.run.dir)
    trained = load_run_config(run_dir / "config.yaml")
    wanted = dataclasses.replace(
        trained,
        run=dataclasses.replace(trained.run, device=config.run.device or trained.run.device),
        eval=dataclasses.replace(
            trained.eval,
            episodes=config.eval.episodes or trained.eval.episodes,
            queries=config.eval.queries or trained.eval.queries,
        ),
    )
    wanted = dataclasses.replace(wanted, data=relocate_data(trained.data, config.data.root))
    validate_train_config(wanted, trains=False)
    from metalearn.training.evaluate_run import (
        evaluate_run,  # here, so that a refused configuration need not wait for torch
    )

    evaluate_run(wanted, run_dir, output_dir)


if __name__ == "__main__":
    evaluate()
