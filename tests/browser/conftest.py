"""A comparison, TensorBoard on its folder, and a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from metalearn.training.tracking.event_files import EVENT_FILES
from tests.browser.comparison import write_comparison
from tests.browser.server import PATIENCE_S, get_json, serve, wait_for

if TYPE_CHECKING:  # it may be missing
    from playwright.sync_api import Browser, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start the system's Chromium; skip the test where it or Playwright is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", *OFFLINE], timeout=1000 * PATIENCE_S
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def comparison(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished comparison; none is made where there is no browser to look at it."""
    folder = tmp_path_factory.mktemp("compared") / "comparison"
    write_comparison(folder)
    return folder


@pytest.fixture(scope="session")
def tensorboard(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of TensorBoard, pointed at a comparison's folder without any setting."""
    with serve(comparison, log=tmp_path_factory.mktemp("tensorboard") / "log") as address:
        runs = {str(path.parent.relative_to(comparison)) for path in comparison.rglob(EVENT_FILES)}
        wait_for(lambda: runs <= set(get_json(f"{address}data/runs")), f"TensorBoard to find {sorted(runs)}")
        with_scalars = runs - {"report"}
        tags = f"{address}data/plugin/scalars/tags"
        wait_for(lambda: all("accuracy/test" in get_json(tags).get(run, {}) for run in with_scalars), "the curves")
        yield address


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(1000 * PATIENCE_S)
    yield context.new_page()
    context.close()


@pytest.fixture
def screenshot(page: Page, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that saves the page as a PNG file, in METALEARN_SCREENSHOTS if that is set."""

    def save(name: str) -> Path:
        path = Path(os.environ.get("METALEARN_SCREENSHOTS") or tmp_path) / f"{name}.png"
        page.screenshot(path=path)
        return path

    return save
