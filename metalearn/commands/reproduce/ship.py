"""Ship a trained model of each setting in ``metalearn/pretrained/``, with a model card.

    python -m metalearn.commands.reproduce.ship outputs/reproduction

Of the recorded rows of a setting, the one with the best mean on validation classes is taken, and of its seeds the one
that is best there. Test classes choose nothing.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metalearn.commands.reproduce.plan import SETTINGS
from metalearn.commands.reproduce.run import REFERENCE
from metalearn.commands.reproduce.table import read_rows, render
from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.inference.loading import load
from metalearn.pretrained.model_file import PRETRAINED

DATA = (
    "Omniglot (Lake, Salakhutdinov & Tenenbaum 2015, Science 350), 28 x 28 pixels, white on black: 1,100 characters "
    "and their rotations to train on, 100 to choose the checkpoint, 423 to test (data.split=classic)"
)
LICENCE = "MIT, as metalearn's; the data set's own is MIT as well"
MODEL_CARD = "MODEL_CARD.md"


def ship(recorded: Sequence[Mapping[str, Any]], rows_dir: Path, target: Path = PRETRAINED) -> None:
    """Export a model of every setting that is recorded, and write the model card.

    Args:
        recorded: rows, as ``read_rows`` returns them.
        rows_dir: folder of their runs, as ``reproduce`` has made it.
        target: folder of the models.

    Raises:
        RunError: if a run is missing, damaged, or not the recorded one; then nothing is written.
    """
    models, contents = [], {}
    for setting in SETTINGS:
        rows = [row for row in recorded if (row["ways"], row["shots"]) == setting]
        if not rows:
            continue
        row = max(rows, key=lambda row: statistics.fmean(run["validation"] for run in row["runs"]))
        best = max(row["runs"], key=lambda run: run["validation"])
        folder = rows_dir / row["experiment"] / f"{row['order']}_order-seed{best['seed']}"
        learner = load(folder, "cpu")
        if learner.card.get("test.accuracy") != best["accuracy"]:
            raise RunError(
                f"{folder}: this is not the run of the recorded row; name the folder where that was trained."
            )
        order = f"inner.second_order={str(row['order'] == 'second').lower()}"
        card = {
            "name": f"omniglot-{setting[0]}w{setting[1]}s",
            "data": DATA,
            "recipe": f"experiment={row['experiment']} {order} run.seed={best['seed']}",
            "licence": LICENCE,
            **learner.card,
        }
        name, content = f"{card['name']}.safetensors", learner.to_bytes(card)
        contents[name] = content
        facts = {"mib": len(content) / 2**20, "sha256": hashlib.sha256(content).hexdigest()}
        models.append({"card": card, "row": row, **facts})
    contents[MODEL_CARD] = render("model_card.md.j2", models=models, data=DATA, licence=LICENCE).encode() + b"\n"
    for name, content in contents.items():  # when all are made
        files.atomic_write_bytes(target / name, content)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m metalearn.commands.reproduce.ship ROWS_FOLDER")
    ship(read_rows(REFERENCE), Path(sys.argv[1]))
