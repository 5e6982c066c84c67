"""Why a run of a comparison failed, from its exit status and output."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalearn.commands.compare.launch import failure_reason


@pytest.mark.parametrize(
    ("status", "written", "reason"),
    [
        (
            2,
            "Run folder: x\nRunError: Training has diverged\nby meta-step 3\n",
            "RunError: Training has diverged\nby meta-step 3",
        ),
        (
            1,
            "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA\n",
            "torch.OutOfMemoryError: CUDA",
        ),
        (1, "ConfigError: old\nValueError: new", "ValueError: new"),
        (1, "RunError: real\nException ignored in: <x>\n", "RunError: real\nException ignored in: <x>"),
        (1, "OSError: full\n\nSet the environment variable HYDRA_FULL_ERROR=1 for ...\n", "OSError: full"),
        (-9, "fine so far", "ended by SIGKILL; the system does this when memory runs out"),
        (-15, "", "ended by SIGTERM"),
        (3, "one\nlast words\n", "exit status 3: last words"),
        (0, "", "exit status 0: it wrote nothing"),
    ],
)
def test_failure_reason_is_the_last_error(status: int, written: str, reason: str, tmp_path: Path) -> None:
    assert failure_reason(status, written, tmp_path) == reason


def test_run_with_metrics_is_finished_whatever_its_status(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    assert failure_reason(-9, "RunError: x", tmp_path) is None
