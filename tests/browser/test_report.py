"""``report.html``, opened from disk, shows both variants by name, their metrics, and every plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from tests.browser.comparison import RUNS, VARIANTS

if TYPE_CHECKING:  # it may be missing
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


def test_report_opens_from_disk(page: Page, comparison: Path, screenshot: Callable[[str], Path]) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto((comparison / "report.html").as_uri())
    for variant in VARIANTS:
        assert page.locator("table").first.get_by_text(variant, exact=True).count() == 1
    results = json.loads((comparison / "results.json").read_text())
    for variant in results["variants"]:
        assert page.get_by_text(f"{variant['accuracy']['mean']:.2%}").count() > 0, "its test accuracy"
    for run in RUNS:
        assert page.get_by_text(run, exact=True).count() == 1
    assert page.locator("svg").count() == 2 * len(list((comparison / "plots").glob("*.svg"))) > 0
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing runs off the page"
    screenshot("report")


@pytest.mark.parametrize(("width", "layout"), [(1280, "wide"), (390, "narrow")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_fits_the_screen_and_its_colours(
    browser: Browser, comparison: Path, width: int, layout: str, scheme: Literal["light", "dark"]
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto((comparison / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing runs off the page"
    pictures = page.locator("svg:visible")
    assert pictures.count() == len(list((comparison / "plots").glob("*.svg")))
    text_width = page.locator("p").first.evaluate("p => p.clientWidth")
    for i in range(pictures.count()):
        assert pictures.nth(i).get_attribute("class") == layout
        box = pictures.nth(i).bounding_box()
        assert box is not None
        assert box["width"] == pytest.approx(text_width, abs=1), "as wide as the text"
    colour = "text => getComputedStyle(text).fill"
    assert page.locator("svg:visible text").first.evaluate(colour) == page.evaluate(
        "getComputedStyle(document.body).color"
    )
    filled = "[...document.querySelectorAll('svg *')].filter(e => getComputedStyle(e).fill == 'rgb(255, 255, 255)')"
    assert page.evaluate(f"{filled}.length") == 0 or scheme == "light", "no white boxes on dark"
    context.close()
