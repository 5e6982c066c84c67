"""TensorBoard on a comparison, in a browser: every page has both variants by name, with their data."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from metalearn.training.tracking.tensorboard import build_layout, metric_columns
from tests.browser.comparison import INNER_STEPS, RUNS, VARIANTS
from tests.browser.server import PATIENCE_S, wait_for

if TYPE_CHECKING:  # it may be missing
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser
LAYOUT = build_layout("accuracy", has_curvature=True, has_eigenvalue=True)
METRICS = metric_columns("accuracy")
Screenshot = Callable[[str], Path]


def visit(page: Page, tensorboard: str, tab: str) -> None:
    page.goto(f"{tensorboard}?darkMode=false#{tab}")


def wait_for_count(locator: Locator, count: int, what: str) -> None:
    try:
        wait_for(lambda: locator.count() == count, what)
    except pytest.fail.Exception:
        pytest.fail(f"{what}: {count} expected, {locator.count()} there after {PATIENCE_S:g} s")


def curves(card: Locator) -> Locator:
    """Find the lines of more than one point."""
    return card.locator("path.line[d*='L']")


def test_time_series_overlays_the_variants(page: Page, tensorboard: str, screenshot: Screenshot) -> None:
    visit(page, tensorboard, "timeseries")
    page.locator("metrics-tag-filter-component input").fill("^accuracy/validation$")
    card = page.locator("scalar-card").filter(has_text=re.compile(r"accuracy\s*/\s*validation(?!_)")).first
    card.wait_for()
    for run in RUNS:
        assert page.locator("runs-table").get_by_text(run, exact=True).count() == 1, "once in the list of runs"
        row = card.locator("tb-data-table-content-row").filter(has_text=run)
        wait_for_count(row, 1, f"rows of {run} under the curves of accuracy/validation")
        assert re.search(r"0\.\d", row.inner_text()), "its last value"
    assert page.locator("runs-table tb-data-table-content-row").count() == len(RUNS) + 1, "these and the report"
    wait_for(lambda: coloured_pixels(card.locator("line-chart").screenshot()) > 300, "the curves to be drawn")
    screenshot("time-series")


def coloured_pixels(png: bytes) -> int:
    """Count pixels that are neither grey nor pale: axes, grid and texts are grey, only curves are not."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("HSV"))
    return int((pixels[..., 1] > 100).sum())


def test_scalars_overlay_the_variants(page: Page, tensorboard: str, screenshot: Screenshot) -> None:
    visit(page, tensorboard, "scalars")
    for run in RUNS:
        page.locator("tf-runs-selector").get_by_text(run, exact=True).wait_for()
    page.locator("tf-scalar-dashboard tf-tag-filterer input").fill("^accuracy/validation$")
    card = page.locator("tf-scalar-card").filter(has=page.get_by_text("tag: accuracy/validation", exact=True)).last
    card.scroll_into_view_if_needed()
    wait_for_count(curves(card), 2 * len(RUNS), "curves of accuracy/validation, each as it is and smoothed")
    screenshot("scalars")


def test_custom_scalars_show_the_layout(page: Page, tensorboard: str, screenshot: Screenshot) -> None:
    visit(page, tensorboard, "custom_scalars")
    cards = page.locator("tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card")
    wait_for_count(cards, sum(map(len, LAYOUT.values())), "charts, none of them twice")
    for category, charts in LAYOUT.items():
        page.locator("tf-category-paginated-view").get_by_text(category, exact=True).first.wait_for()
        for title, (kind, tags) in charts.items():
            card = cards.filter(has=page.get_by_text(title, exact=True))
            wait_for_count(card, 1, f"charts called {title}")
            series = INNER_STEPS + 1 if "adjoint_norm" in tags[0] else 1
            matches = card.locator(".match-list-entry")
            wait_for_count(matches, series * len(RUNS), f"curves matched by {title}")
            texts = "\n".join(text or "" for text in matches.all_text_contents())
            assert all(texts.count(run) == series for run in RUNS), texts
            wait_for_count(curves(card), 2 * series * len(RUNS), f"curves of {title}, each as it is and smoothed")
            if kind == "Margin":
                wait_for_count(card.locator("path.area[d*='L']"), len(RUNS), f"the intervals of {title}")
    screenshot("custom-scalars")
    page.get_by_text("norm of the adjoint at every inner step").scroll_into_view_if_needed()
    screenshot("custom-scalars-second-order")


def test_hparams_shows_every_run_with_its_metrics(page: Page, tensorboard: str, screenshot: Screenshot) -> None:
    visit(page, tensorboard, "hparams")
    cells = page.locator("tf-hparams-table-view vaadin-grid-cell-content")
    for run in RUNS:
        cells.get_by_text(run, exact=True).wait_for()
    texts = [text.strip() for text in cells.all_inner_texts()]
    headings = ["inner.second_order", "run.seed", *METRICS.values()]
    for heading in headings:
        assert heading in texts, f"{heading} is no column"
        box = cells.get_by_text(heading, exact=True).bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= page.evaluate("window.innerWidth"), f"{heading} is off the screen"
    starts = sorted(texts.index(run) for run in RUNS)
    for run in RUNS:
        start = texts.index(run)
        row = texts[start : min((s for s in starts if s > start), default=len(texts))]
        assert str(VARIANTS[run.rpartition("-")[0]]).lower() in row, "inner.second_order"
        numbers = [float(text) for text in row if re.fullmatch(r"[\d.]+", text)]
        assert len(numbers) >= 1 + len(METRICS), f"the seed and the metrics of {run}"
        assert all(number > 0 for number in numbers[-len(METRICS) :]), row
    assert "report" not in texts, "it is not a training"
    screenshot("hparams")


def test_images_show_the_tasks_of_every_run(
    page: Page, tensorboard: str, comparison: Path, screenshot: Screenshot
) -> None:
    plots = sorted(path.stem for path in (comparison / "plots").glob("*.png"))
    assert len(plots) >= 6
    visit(page, tensorboard, "images")
    for tag, run in [("tasks/validation", run) for run in RUNS] + [(f"report/{name}", "report") for name in plots]:
        card = (
            page.locator("tf-image-loader")
            .filter(has=page.get_by_text(run, exact=True))
            .filter(has_text=re.compile(rf"{tag}\b"))
        )
        wait_for_count(card, 1, f"{tag} of {run}")
        card.scroll_into_view_if_needed()
        wait_for(partial(has_picture, card), f"the picture {tag} of {run}")
    page.locator("tf-image-loader").first.scroll_into_view_if_needed()
    screenshot("images")


def has_picture(card: Locator) -> bool:
    image = card.locator("img")
    return image.count() > 0 and bool(image.first.evaluate("image => image.naturalWidth > 0"))


def test_text_shows_the_report_and_every_configuration(page: Page, tensorboard: str, screenshot: Screenshot) -> None:
    visit(page, tensorboard, "text")
    report = page.locator("tf-text-loader").filter(has=page.get_by_text("report", exact=True))
    wait_for_count(report, 1, "texts of the report")
    for variant in VARIANTS:
        wait_for_count(report.locator("td td").get_by_text(variant, exact=True), 1, f"rows of {variant} in its table")
    configs = page.locator("tf-text-loader").filter(has_text="config")
    for run in RUNS:
        wait_for_count(configs.filter(has=page.get_by_text(run, exact=True)), 1, f"the configuration of {run}")
    report.scroll_into_view_if_needed()
    screenshot("text")
