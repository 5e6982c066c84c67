"""No interval of an accuracy reaches beyond 0 and 100% where a command prints or draws it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer

from metalearn.commands.adapt.predictions import format_accuracy
from metalearn.commands.compare.plots import plots
from metalearn.commands.compare.results import Results
from metalearn.commands.compare.tables import (
    difference_rows,
    format_points,
    headline,
    per_step_rows,
    run_rows,
    variant_rows,
)
from metalearn.commands.reproduce.table import format_interval, render
from metalearn.training.evaluation import ACCURACY, MSE, Evaluation, MeanCI
from metalearn.training.tracking.event_files import read_scalars
from metalearn.training.tracking.tensorboard import TensorBoardLogger
from tests.commands.compare.factories import difference, results, variant

HIGH, LOW = MeanCI(0.95, 0.2), MeanCI(0.1, 0.3)
_CLIPPED = re.compile(r"\(([-\d.]+) to ([-\d.]+)%?\)")


def extreme() -> Results:
    """Return two variants whose every interval passes 0 or 100%, and a difference that passes 100 points."""
    variants = []
    for name, estimate in (("high", HIGH), ("low", LOW)):
        made = variant(name, estimate.mean, seeds=2)
        metrics = {
            "test.accuracy": estimate.mean,
            "test.ci95": estimate.ci95,
            "test.accuracy_nontransductive": estimate.mean,
            "test.ci95_nontransductive": estimate.ci95,
        }
        runs = [dataclasses.replace(run, metrics=run.metrics | metrics) for run in made.runs]
        steps = [estimate] * 3
        made = dataclasses.replace(made, accuracy=estimate, nontransductive=estimate, per_step=steps, runs=runs)
        variants.append(made)
    return results(variants, [difference(variants[0], variants[1], (0.9, 0.8), 1.2)], seeds=2)


def printed() -> Iterator[tuple[str, str]]:
    """Yield every place that prints an interval, with what it prints."""
    given = extreme()
    for rows in (variant_rows, per_step_rows, run_rows, difference_rows):
        yield rows.__name__, str(rows(given))
    yield "headline", " ".join(headline(given))
    yield "headline of one variant", " ".join(headline(results(extreme().variants[:1])))
    for estimate in (HIGH, LOW):
        yield "MeanCI", estimate.format(ACCURACY)
        yield "reproduce", format_interval({"mean": estimate.mean, "ci95": estimate.ci95, "over": "tasks"})
    card = {"test.accuracy": 0.95, "test.ci95": 0.2, "test.accuracy_nontransductive": 0.1}
    card |= {"test.ci95_nontransductive": 0.3, "iterations": 1, "validation.best_iteration": 1}
    card |= {"validation.best_accuracy": 0.9, "time.total_s": 1}
    row = {"accuracy": {"mean": 0.95, "ci95": 0.2, "over": "seeds"}, "published": None}
    model = {"card": _Card(card), "row": row, "mib": 1, "sha256": ""}
    yield "model card", render("model_card.md.j2", models=[model], data="", licence="")


class _Card(dict[str, object]):
    """A model card whose other fields are empty."""

    def __missing__(self, name: str) -> str:
        return ""


@pytest.mark.parametrize(("place", "text"), list(printed()))
def test_printed_intervals_end_at_0_and_100(place: str, text: str) -> None:
    found = [(float(low), float(high)) for low, high in _CLIPPED.findall(text)]
    assert found, "the interval is given by its ends"
    lowest = -100 if place in ("headline", "difference_rows") else 0
    assert all(lowest <= low < high <= 100 for low, high in found)
    for mean, half in re.findall(r"([-+\d.]+)%? ± ([\d.]+)", text):
        assert lowest <= float(mean) - float(half), place
        assert float(mean) + float(half) <= 100, place


def test_interval_is_cut_only_where_it_passes() -> None:
    assert str(MeanCI(0.7433, 0.2541)) == "74.33% ± 25.41%"
    assert str(MeanCI(0.9433, 0.2541)) == "94.33% (68.92 to 100%)"
    assert str(MeanCI(1.0, 0.0)) == "100.00% ± 0.00%"
    assert format_points(MeanCI(-0.05, 1.27)) == "-5.00 (-100 to 100)"
    assert MeanCI(2.0, 3.0).format(MSE) == "2 ± 3", "not a percentage"


def test_drawn_intervals_and_axes_end_at_0_and_100() -> None:
    for name in ("accuracy", "accuracy_per_step", "overview", "validation"):
        figure = plots(extreme())[name]
        for axes in figure.axes[: 1 if name == "overview" else None]:
            along = 0 if name in ("accuracy", "overview") else 1
            lowest = -100 if name == "overview" else 0
            ends = [bars for c in axes.containers if isinstance(c, ErrorbarContainer) for bars in c.lines[2]]
            for bars in [*ends, *(found for found in axes.collections if isinstance(found, LineCollection))]:
                drawn = np.array(bars.get_segments())[..., along]
                assert drawn.min() >= lowest, name
                assert drawn.max() <= 100 + 1e-9, name
            low, high = axes.get_xlim() if along == 0 else axes.get_ylim()
            assert lowest - 4 <= low < high <= 100 + 4, f"{name}: half a marker's room"
            ticks = axes.get_xticks() if along == 0 else axes.get_yticks()
            assert all(lowest <= tick <= 100 for tick in ticks if low <= tick <= high), name


def test_logged_intervals_end_at_0_and_100(tmp_path: Path) -> None:
    scores = torch.tensor([[0.0, 0.4], [0.6, 1.0]])  # half-widths of 0.39 around 0.2 and 0.8
    with TensorBoardLogger(tmp_path, config="") as tensorboard:
        tensorboard.log_validation(Evaluation(scores, None), 1)
        tensorboard.log_test(Evaluation(scores, None), 1)
    curves = read_scalars(tmp_path)
    assert [point.value for point in curves["intervals/accuracy/test_by_inner_step_low"]] == pytest.approx(
        [0, 0.408], abs=1e-6
    )
    assert [point.value for point in curves["intervals/accuracy/test_by_inner_step_high"]] == pytest.approx(
        [0.592, 1], abs=1e-6
    )
    assert curves["intervals/accuracy/validation_high"][0].value == 1


def test_adapted_accuracies_end_at_0_and_100() -> None:
    assert format_accuracy([True] * 3).endswith("95% interval 43.8% to 100.0%)")
    assert format_accuracy([False] * 3).endswith("95% interval 0.0% to 56.2%)")
