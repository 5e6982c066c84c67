"""Adapt a run to a folder of images and predict another: read, invert if needed, adapt, predict, write."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from metalearn.commands.adapt.checks import check_known_classes
from metalearn.commands.adapt.predictions import (
    Predictions,
    format_accuracy,
    print_predictions,
    printable_name,
    write_csv,
    write_picture,
)
from metalearn.config.commands_schema import AdaptConfig
from metalearn.core.paths import expand_home
from metalearn.core.text import plural
from metalearn.data.image_decoding import FolderImages
from metalearn.inference.inversion import apply_inversion, should_invert
from metalearn.inference.learner import Learner
from metalearn.inference.loading import load
from metalearn.training.run_folder import check_no_run_in
from metalearn.training.tracking.console import print_path, print_summary, progress_bar

WEIGHTS, TABLE, PICTURE = "adapted.safetensors", "predictions.csv", "predictions.png"
"""Files in the output folder."""


def run_adapt(config: AdaptConfig, output_dir: Path) -> None:
    """Adapt a run to the support folder, or load adapted weights, and predict the query folder.

    Raises:
        DataError: if images cannot be read, or a class of the queries was not adapted to.
        RunError: if checkpoint or weights cannot be loaded, or the algorithm does not support that many classes.
        RunExistsError: if the output folder holds such files already.
    """
    check_no_run_in(output_dir, (WEIGHTS, TABLE, PICTURE))
    learner = load(config.run.dir, config.run.device, trust_code=config.run.trust_code)
    support = _read(config.support, learner, config)
    query = _read(config.query, learner, config, may_be_flat=True)
    first = support or query
    assert first is not None, "check_adapt requires support or query"
    inverted = should_invert(config.invert, first.images, learner.config.data)

    # Adapt, or load weights that were adapted before.
    if support is not None:
        support = support._replace(images=apply_inversion(support.images, inverted))
        assert support.labels is not None, "support is a folder of classes"
        learner.adapt(support.images, support.labels, steps=config.steps)
    else:
        learner.restore(str(config.weights))
    if support is not None or config.save is not None:
        path = learner.save(config.save or output_dir / WEIGHTS)
        print_path("Adapted weights", path)

    # Predict, and report.
    print_path("Run", learner.run_dir)
    facts = {
        "checkpoint": f"{learner.algorithm.name}, meta-step {learner.iteration}",
        "adapted to": f"{len(learner.classes_)} classes, "
        + (plural(len(support.images), "image") if support else f"from {config.weights}"),
        "inner steps": str(learner.steps_),
        "images": f"{'x'.join(map(str, learner.example_shape))}, {'inverted' if inverted else 'not inverted'}",
    }
    if query is not None:
        images = apply_inversion(query.images, inverted)
        predictions = _predict(learner, query, images, str(config.query))
        write_csv(predictions, output_dir / TABLE)
        learned = (support.images, support.labels) if support and support.labels else None
        write_picture(predictions, images, output_dir / PICTURE, learned_from=learned)
        print_predictions(predictions)
        correct = predictions.correct
        facts["accuracy" if correct else "predicted"] = (
            format_accuracy(correct) if correct else plural(len(images), "image")
        )
    print_summary("Adapted", facts)
    print_path("Written to", output_dir)


def _read(
    folder: str | None, learner: Learner, config: AdaptConfig, *, may_be_flat: bool = False
) -> FolderImages | None:
    if folder is None:
        return None
    return learner.read(folder, on_unreadable=config.on_unreadable, invert=False, may_be_flat=may_be_flat)


def _predict(learner: Learner, query: FolderImages, images: Tensor, folder: str) -> Predictions:
    classes = [str(one) for one in learner.classes_]  # weights saved from Python may have labels that are numbers
    check_known_classes(query.classes, classes, folder)
    with progress_bar() as progress:
        bar = progress.add_task("predict", total=len(images), note="")
        probabilities = learner.predict_proba(images, progress=lambda done: progress.update(bar, completed=done))
    truth = None
    if query.labels is not None:
        truth = [classes.index(label) for label in query.labels]
    root = expand_home(folder)
    names = [printable_name(path.relative_to(root)) for path in query.paths]
    return Predictions(names, probabilities, [printable_name(one) for one in classes], truth)
