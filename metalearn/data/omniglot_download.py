"""Unpack or download Omniglot, completely or not at all.

No archive is unpacked before its digest was compared, here or by torchvision, and none from disk if one of its members
would be written outside of the target folder.
"""

from __future__ import annotations

import http.client
import logging
import os
import shutil
import socket
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path, PureWindowsPath

from filelock import FileLock

from metalearn.core.errors import DataError
from metalearn.data.metadata import OMNIGLOT_PARTS, omniglot_base, omniglot_root, omniglot_source

log = logging.getLogger(__name__)

_UNPACKING = ".unpacking-"


def ensure_omniglot(root: str | None) -> None:
    """Unpack or download Omniglot below ``root`` if its folders are not there yet; raise ``DataError`` if that fails.

    Runs that start together wait for each other, and an interrupted download leaves nothing behind.
    """
    if omniglot_source(root) == "disk":
        return
    folder = omniglot_root(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".omniglot.lock"):
            source = omniglot_source(root)  # again: another run may have finished meanwhile
            if source == "archives":
                _unpack(omniglot_base(root))
            elif source == "download":
                _download(folder)
    except (OSError, RuntimeError, http.client.HTTPException, zipfile.BadZipFile) as error:
        # torchvision raises RuntimeError for a wrong digest
        raise DataError(
            f"Omniglot could not be saved in {folder}: {error}. Run again, point data.root to a copy, or train on "
            "the embedded data with data=glyphs."
        ) from error


def _unpack(base: Path) -> None:
    """Extract the archives whose folders are missing, after comparing their digests with the published ones."""
    # Imported here, as torchvision's import is slow and this runs once.
    from torchvision.datasets import Omniglot
    from torchvision.datasets.utils import check_integrity, extract_archive

    for part in OMNIGLOT_PARTS:
        archive = base / f"{part}.zip"
        if (base / part).is_dir():
            continue
        if not check_integrity(str(archive), Omniglot.zips_md5[part]):
            raise DataError(
                f"{archive} is damaged: its MD5 is not the published {Omniglot.zips_md5[part]}. Remove it and run "
                "again with a network, or replace it."
            )
        _check_members_inside(archive)
        log.info("Unpacking %s", archive)
        with _temporary_folder(base) as temporary:
            extract_archive(str(archive), str(temporary))
            os.replace(temporary / part, base / part)


def _check_members_inside(archive: Path) -> None:
    """Raise ``DataError`` for a member that is absolute, climbs out with ``..`` or is a link."""
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            name = member.filename
            path = PureWindowsPath(name)  # either slash separates, and drives are known
            if path.anchor or ".." in path.parts or stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(
                    f"{archive} is not unpacked: its member {name!r} is absolute, climbs out with .. or is a link, "
                    "unlike those of Omniglot's archives. Remove the archive, and run again with a network or copy it "
                    "again."
                )


def _download(folder: Path) -> None:
    from torchvision.datasets import Omniglot

    log.info("Downloading Omniglot to %s", folder)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with _temporary_folder(folder) as temporary, open(os.devnull, "w") as quiet, redirect_stdout(quiet):
            for background in (True, False):
                Omniglot(str(temporary), background=background, download=True)
            os.replace(temporary / "omniglot-py", folder / "omniglot-py")  # atomic; replaces an empty folder
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a folder on the same disk and remove it afterwards, with those that killed processes left."""
    for leftover in parent.glob(f"{_UNPACKING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=_UNPACKING, ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)
