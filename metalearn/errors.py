"""Mistakes outside the program that its user can mend; scripts print them without a stack trace."""

from __future__ import annotations

from pathlib import Path


class MetalearnError(Exception):
    """Base of the errors whose message says what was wrong, and what to do."""


class ConfigError(MetalearnError):
    """A configuration that cannot be run; the message lists every fault."""


class DataError(MetalearnError):
    """A data set that is missing, damaged or too small."""


class RunError(MetalearnError):
    """A run's folder or files that cannot be used as asked, or a training that cannot go on."""


class FolderTakenError(RunError):
    """An output folder that holds another run, which would be overwritten."""

    def __init__(self, folder: Path, file: str) -> None:
        super().__init__(
            f"hydra.run.dir={folder} already holds a run (its {file}), which would be overwritten. Choose another "
            "folder, or leave hydra.run.dir out for a new one."
        )
