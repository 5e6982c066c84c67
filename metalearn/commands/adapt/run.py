"""From two folders of images to predictions: read, exchange black and white where needed, adapt, predict, write."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from torch import Tensor

from metalearn.commands.adapt.checks import refuse_unknown
from metalearn.commands.adapt.picture import write_picture
from metalearn.commands.adapt.predictions import (
    Predictions,
    accuracy_text,
    print_predictions,
    printable_name,
    write_csv,
)
from metalearn.config.commands_schema import AdaptConfig
from metalearn.config.run_folder import check_no_run_in
from metalearn.data.image_decoding import FolderImages
from metalearn.inference.inversion import apply_inversion, should_invert
from metalearn.inference.learner import Learner, load
from metalearn.training.tracking.console import print_path, print_summary, progress_bar

WEIGHTS, TABLE, PICTURE = "adapted.safetensors", "predictions.csv", "predictions.png"
"""What is written into the output folder."""


def run_adapt(config: AdaptConfig, output_dir: Path) -> None:
    """Adapt a run to the support folder, or take weights that were; predict the query folder.

    Args:
        config: checked.
        output_dir: for ``adapted.safetensors``, ``predictions.csv`` and ``predictions.png``.

    Raises:
        DataError: if images cannot be read, or a class of the queries was not adapted to.
        RunError: if the checkpoint or the weights cannot be used, or the algorithm not for that many classes.
        FolderTakenError: if the folder holds such files already.
    """
    check_no_run_in(output_dir, (WEIGHTS, TABLE, PICTURE))
    learner = load(config.run.dir, config.run.device)
    support = _read(config.support, learner, config)
    query = _read(config.query, learner, config, may_be_flat=True)
    first = support or query
    assert first is not None, "the configuration was checked"
    inverted = should_invert(config.invert, first.images, learner.config.data)
    if support is not None:
        assert support.labels is not None, "it is a folder of classes"
        labels = [support.classes[label] for label in support.labels.tolist()]
        learner.adapt(apply_inversion(support.images, inverted), labels, steps=config.steps)
    else:
        learner.restore(str(config.weights))
    if support is not None or config.save is not None:
        _save(learner, Path(config.save) if config.save else output_dir / WEIGHTS)
    facts = {
        "run": f"{escape(str(learner.run_dir))} ({learner.algorithm.name}, meta-step {learner.iteration})",
        "adapted to": f"{len(learner.classes_)} classes, "
        + (f"{len(support.images)} images" if support else f"from {escape(str(config.weights))}"),
        "inner steps": str(learner.steps_),
        "images": f"{'x'.join(map(str, learner.example_shape))}, {'inverted' if inverted else 'not inverted'}",
    }
    if query is not None:
        predictions = _predict(learner, query, apply_inversion(query.images, inverted), str(config.query))
        write_csv(predictions, output_dir / TABLE)
        write_picture(predictions, apply_inversion(query.images, inverted), output_dir / PICTURE)
        print_predictions(predictions)
        right = predictions.right
        facts["accuracy" if right else "predicted"] = accuracy_text(right) if right else f"{len(query.images)} images"
    print_summary("Adapted", facts)
    print_path("Written to", output_dir)


def _read(
    folder: str | None, learner: Learner, config: AdaptConfig, *, may_be_flat: bool = False
) -> FolderImages | None:
    if folder is None:
        return None
    return learner.read(folder, unreadable=config.on_unreadable, invert=False, may_be_flat=may_be_flat)


def _save(learner: Learner, path: Path) -> None:
    learner.save(path)
    print_path("Adapted weights", path)


def _predict(learner: Learner, query: FolderImages, images: Tensor, folder: str) -> Predictions:
    classes = [str(one) for one in learner.classes_]  # labels of Python users may be numbers, as folders' names are not
    refuse_unknown(query.classes, classes, folder)
    with progress_bar() as progress:
        bar = progress.add_task("predict", total=len(images), note="")
        probabilities = learner.predict_proba(images, progress=lambda done: progress.update(bar, completed=done))
    truth = None
    if query.labels is not None:
        truth = [classes.index(query.classes[label]) for label in query.labels.tolist()]
    root = Path(folder).expanduser()
    names = [printable_name(path.relative_to(root)) for path in query.paths]
    return Predictions(names, probabilities, [printable_name(one) for one in classes], truth)
