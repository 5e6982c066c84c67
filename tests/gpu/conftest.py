"""Build a CUDA runtime that computes nothing (see noop_cuda/README.md), and run programs on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import REPO

HERE = Path(__file__).parent
PRELUDE = (HERE / "noop_cuda" / "prelude.py").read_text()
TIMEOUT_S = 120

OnNoop = Callable[..., dict[str, Any]]
"""Runs the body of a program on the runtime, with environment variables, and returns what it passes to ``report``."""


@pytest.fixture(scope="session")
def noop_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a process on the runtime; skip where it cannot be built or loaded."""
    if not (sys.platform == "linux" and torch.version.cuda and shutil.which("g++") and shutil.which("nm")):
        pytest.skip("the no-op CUDA runtime needs Linux, torch's CUDA build, g++ and nm")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU; the no-op CUDA runtime would take its place")
    include = next((p.parent for p in map(Path, _cuda_includes()) if p.is_file()), None)
    if include is None:
        pytest.skip("no CUDA headers beside torch's CUDA build, which the no-op CUDA runtime needs")
    folder = tmp_path_factory.mktemp("noop_cuda")
    command = ["bash", str(HERE / "noop_cuda" / "build.sh"), str(include), str(folder)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the no-op CUDA runtime cannot be built here: {built.stderr[-300:]}")
    env = {
        "LD_PRELOAD": str(folder / "libnoop.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO),
    }
    probe = "import os, torch; torch.zeros(2, device='cuda') + 1; os._exit(0)"
    loaded = subprocess.run([sys.executable, "-c", probe], env={**os.environ, **env}, capture_output=True, text=True)
    if loaded.returncode:
        pytest.skip(f"torch {torch.__version__} does not load the no-op CUDA runtime: {loaded.stderr[-300:]}")
    return env


def _cuda_includes() -> list[str]:
    """Return where the packages of torch's CUDA build may have the runtime's header."""
    packages = find_spec("nvidia")
    folders = (packages and packages.submodule_search_locations) or []
    parts = (f"cu{str(torch.version.cuda).split('.')[0]}", "cuda_runtime")
    return [f"{folder}/{part}/include/cuda_runtime_api.h" for folder in folders for part in parts]


@pytest.fixture(scope="session")
def on_noop(noop_env: dict[str, str]) -> OnNoop:
    """Return the function that runs a program on the runtime."""

    def run(body: str, **env: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + body],
            env={**os.environ, **noop_env, **env},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        reported: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return reported

    return run
