"""What ``import metalearn`` does to the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from metalearn import _SPIN_COUNT


@pytest.mark.parametrize(
    ("imports", "own", "expected"),
    [
        ("import metalearn, torch", {}, _SPIN_COUNT),
        ("import torch, metalearn", {}, None),  # OpenMP has read the environment by then
        ("import metalearn", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import metalearn", {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_of_torch_sleep_sooner_unless_the_user_chose(
    imports: str, own: dict[str, str], expected: str | None
) -> None:
    program = f"{imports}; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=inherited | own, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)
