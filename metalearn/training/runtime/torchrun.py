"""Rank and world size as ``torchrun`` sets them. Does not import torch, so that configuration errors come fast."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the number of this process among those of this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """Return the number of processes of this run; 1 without ``torchrun``."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def report_error(message: str) -> None:
    """Have ``torchrun`` include the message in its own error summary."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # The format that torch.distributed.elastic's ErrorHandler writes.
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(file).write_text(json.dumps(content))
