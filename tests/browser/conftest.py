"""A comparison, TensorBoard on its folder, and a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from metalearn.training.tracking.event_files import EVENT_FILES
from tests.browser.comparison import write_comparison

if TYPE_CHECKING:  # it may be missing
    from playwright.sync_api import Browser, Page

PATIENCE_S = 120.0  # the machine may be busy
WIDTH = 1600  # of the page, in pixels
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's own; without one, or without Playwright, the test is skipped."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    path = next((found for name in _CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(_CHROMIUM)} is installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", *_OFFLINE], timeout=1000 * PATIENCE_S
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def comparison(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison; none is made where there is no browser to look at it."""
    folder = tmp_path_factory.mktemp("compared") / "comparison"
    write_comparison(folder)
    return folder


@pytest.fixture(scope="session")
def tensorboard(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of TensorBoard, pointed at a comparison's folder without any setting."""
    folder = comparison
    with served(folder, log=tmp_path_factory.mktemp("tensorboard") / "log") as address:
        runs = {str(path.parent.relative_to(folder)) for path in folder.rglob(EVENT_FILES)}
        wait_for(lambda: runs <= set(get_json(f"{address}data/runs")), f"TensorBoard to find {sorted(runs)}")
        with_scalars = runs - {"report"}
        tags = f"{address}data/plugin/scalars/tags"
        wait_for(lambda: all("test/accuracy" in get_json(tags).get(run, {}) for run in with_scalars), "the curves")
        yield address


@contextmanager
def served(folder: Path, *, log: Path) -> Iterator[str]:
    """TensorBoard in a process of its own, on a port that it finds itself."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "localhost"]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: address_in(log) is not None or process.poll() is not None, "TensorBoard to start")
        address = address_in(log)
        assert address is not None, log.read_text()
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def address_in(log: Path) -> str | None:
    """Where TensorBoard says that it is."""
    found = re.search(r"http://localhost:\d+/", log.read_text())
    return found.group() if found else None


def get_json(address: str) -> Any:
    """What the server answers; the proxy of the environment knows nothing of this machine."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(address, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until something is true; a failure after two minutes."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.1)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page."""
    context = browser.new_context(viewport={"width": WIDTH, "height": 1000})
    context.set_default_timeout(1000 * PATIENCE_S)
    yield context.new_page()
    context.close()


@pytest.fixture
def screenshot(page: Page, tmp_path: Path) -> Callable[[str], Path]:
    """Keeps what the page shows, in METALEARN_SCREENSHOTS if that is set."""

    def keep(name: str) -> Path:
        path = Path(os.environ.get("METALEARN_SCREENSHOTS") or tmp_path) / f"{name}.png"
        page.screenshot(path=path)
        return path

    return keep
