"""Mistakes outside the program that its user can mend; scripts print them without a stack trace."""

from __future__ import annotations


class MetalearnError(Exception):
    """Base of the errors whose message says what was wrong, and what to do."""


class ConfigError(MetalearnError):
    """A configuration that cannot be run; the message lists every fault."""


class DataError(MetalearnError):
    """A data set that is missing, damaged or too small."""


class RunError(MetalearnError):
    """A run's folder or files that cannot be used as asked, or a training that cannot go on."""
