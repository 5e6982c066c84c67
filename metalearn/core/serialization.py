"""Save and load tensors atomically, verified by a digest.

``torch.load`` does not notice flipped bits, so the SHA-256 of each file is saved as ``NAME.sha256``. While a file is
being replaced, that holds both the old digest and the new one: an interruption at any moment leaves a readable file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

import torch

from metalearn.core.errors import OS_ERROR_HINTS, RunError

_PAUSES_S = (0.2, 2.0)  # before another try to write
_READS = 3  # a file may be replaced between the reading of it and of its digest


class CorruptFileError(RunError):
    """A file not written by ``save_checked``, or another than its name says: its digest differs, it holds code, …"""


def check_new_file(path: Path, example: str, *, overwrite: bool) -> None:
    """Raise ``RunError`` if a file cannot be made there: a folder is, or a file that may not be overwritten."""
    if path.is_dir():
        raise RunError(f"{path} is a folder; name a file in it, as {path / example}.")
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists, and is not overwritten; remove it, or choose another name.")


def atomic_write_text(path: Path, text: str) -> None:
    """Write a file through a temporary one: a reader sees the old content or the new, never a part."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, content: Any, *, allow_nan: bool = True) -> None:
    """Write indented JSON as ``atomic_write_text`` does."""
    atomic_write_text(path, json.dumps(content, indent=2, allow_nan=allow_nan) + "\n")


def save_checked(content: Any, path: Path) -> None:
    """Save plain containers of tensors, and a digest in a second file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    digests = _digest_path(path)
    new = hashlib.sha256(data).hexdigest().encode() + b"\n"
    atomic_write_bytes(digests, (digests.read_bytes() + b"\n" if digests.exists() else b"") + new)
    atomic_write_bytes(path, data)
    atomic_write_bytes(digests, new)


def load_checked(path: Path) -> Any:
    """Load a file of ``save_checked`` into main memory; no code in it is run.

    Raises:
        FileNotFoundError: if there is no such file.
        CorruptFileError: if the digest is missing or differs, or if loading would run code.
    """
    digest = _digest_path(path)
    for _ in range(_READS):
        data = path.read_bytes()
        if not digest.exists():
            raise CorruptFileError(
                f"{path} has no digest file ({digest.name}): writing it was interrupted, or it is elsewhere."
            )
        if hashlib.sha256(data).hexdigest().encode() in digest.read_bytes().split():
            return _load_weights_only(data, path)
    raise CorruptFileError(f"{path} is damaged: its SHA-256 differs from {digest.name}.")


def _load_weights_only(data: bytes, path: Path) -> Any:
    """Load containers, numbers, text and tensors, and nothing else."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:  # of any kind, as its unpickler trusts what it reads; torch's message advises to load it anyway
        raise CorruptFileError(
            f"{path} is refused: it is no file of plain tensors, and loading it could run code. Nothing in it was run."
        ) from None


def remove(path: Path) -> None:
    """Remove a file of ``save_checked`` and its digest, if they exist."""
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)


def remove_temporary_files(folder: Path, *, unused_s: float | None = None) -> None:
    """Remove the files of killed writers from a folder.

    Where other processes may be writing, ``unused_s`` is for how many seconds a file was not written to.
    """
    for path in folder.glob(".*"):
        is_temporary = re.fullmatch(r"\..+\.[0-9a-f]{16}", path.name)
        if is_temporary and (unused_s is None or time.time() - path.stat().st_mtime > unused_s):
            path.unlink(missing_ok=True)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write bytes like ``atomic_write_text``; try again where the system's error may pass by itself."""
    for pause in (*_PAUSES_S, None):
        try:
            _write_bytes(path, data)
            return
        except OSError as error:
            if pause is None or error.errno in OS_ERROR_HINTS:
                raise
            time.sleep(pause)


def _write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def _fsync_directory(folder: Path) -> None:
    """Flush a renaming to disk before what follows; Windows has no such call for folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
