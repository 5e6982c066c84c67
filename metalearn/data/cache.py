"""Verified tensors on disk, in place of files that take long to decode."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metalearn.core import serialization as files

log = logging.getLogger(__name__)

_UNUSED_S = 3600.0  # no writer takes so long for the few MB of a file


def load_or_build(
    path: Path,
    what: str,
    build: Callable[[], tuple[Any, bool]],
    *,
    is_current: Callable[[Any], bool] = lambda content: True,
) -> Any:
    """Return the content of a cached file, or build it if there is none, or it is damaged or not ``is_current``.

    ``build`` returns the content, and whether to save it; ``what`` is its name in the warning if that fails.
    """
    with contextlib.suppress(OSError):  # another process has removed them, or may alone
        files.remove_temporary_files(path.parent, unused_s=_UNUSED_S)
    try:
        if is_current(content := files.load_checked(path)):
            return content
    except OSError:  # no cache yet, or it cannot be read
        pass
    except files.CorruptFileError as error:
        log.warning("%s It is rebuilt.", error)
    content, lasting = build()
    if lasting:
        try:
            files.save_checked(content, path)
        except OSError as error:
            log.warning("%s could not be cached, so every run will read all files again: %s", what, error)
    return content
