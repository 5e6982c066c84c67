"""Tensors on disk, written whole or not at all, and checked by digest before they are believed.

``torch.load`` does not notice flipped bits, so a SHA-256 stands beside each file as ``NAME.sha256``.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from metalearn.errors import RunError


class DamagedFileError(RunError):
    """A file's content does not match its digest, or the digest is missing."""


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary one beside it: a reader sees the old content or the new, never a part."""
    _replace(path, text.encode())


def save(content: Any, path: Path) -> None:
    """Save plain containers of tensors, with a digest beside them."""
    with tempfile.TemporaryFile() as buffer:
        torch.save(content, buffer)
        buffer.seek(0)
        data = buffer.read()
    _replace(path, data)
    write_text(_digest_path(path), hashlib.sha256(data).hexdigest() + "\n")


def load(path: Path, *, device: torch.device | str = "cpu") -> Any:
    """Load what ``save`` wrote; no code in the file is run.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedFileError: if the digest is missing or differs.
    """
    data = path.read_bytes()
    digest = _digest_path(path)
    if not digest.exists():
        raise DamagedFileError(f"{path} has no digest beside it ({digest.name}): its writing was interrupted.")
    if hashlib.sha256(data).hexdigest() != digest.read_text().strip():
        raise DamagedFileError(f"{path} is damaged: its SHA-256 differs from {digest.name}.")
    with path.open("rb") as file:
        return torch.load(file, map_location=device, weights_only=True)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
