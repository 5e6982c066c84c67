"""``report.html``, opened from disk, shows both variants by name, their metrics, and every plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.comparison import RUNS, VARIANTS

if TYPE_CHECKING:  # it may be missing
    from playwright.sync_api import Page

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
    images = page.locator("img")
    assert images.count() == len(list((comparison / "plots").glob("*.svg"))) > 0
    for i in range(images.count()):
        assert images.nth(i).evaluate("image => image.complete && image.naturalWidth > 0")
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing runs off the page"
    screenshot("report")
