"""TensorBoard in a process, and waiting for what a busy machine does late."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 120.0


@contextmanager
def serve(folder: Path, *, log: Path) -> Iterator[str]:
    """Run TensorBoard on a free port; yield its address."""
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
    found = re.search(r"http://localhost:\d+/", log.read_text())
    return found.group() if found else None


def get_json(address: str) -> Any:
    """Ask the server, without the environment's proxy, which does not know this machine."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(address, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition is true; fail after two minutes."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.1)
