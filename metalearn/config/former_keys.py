"""Former and short names of keys: the former still accepted in experiment files and the ``config.yaml`` of runs too."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

RENAMED = {
    "run.checkpoint_seconds": "run.checkpoint_every_s",
    "run.memory_limit": "run.memory_limit_mib",
    "inner.snapshot_every": "inner.checkpoint_every",
    "inner.rule": "inner.optimizer",
    "algorithm.strength": "algorithm.proximal_weight",
    "data.unreadable": "data.on_unreadable",
    "compare.limit_mib": "compare.memory_limit_mib",
    "compare.rounds": "compare.repeats",
    "bench.limit_mib": "bench.memory_limit_mib",
    "bench.rounds": "bench.repeats",
}
RENAMED_IN = {
    "adapt": {"unreadable": "on_unreadable"},
    "reproduce": {
        "row": "experiment_name",
        "experiment": "experiment_name",  # a group of Hydra's, so that no key can have this name
        "minutes": "time_limit_minutes",
        "record": "update_reference",
    },
}
"""Keys in no section, by the command that had them."""

SHORT = {"adapt": {"run": "run.dir"}, "evaluate": {"run": "run.dir"}}
"""Shorter names of keys that stay, by command."""

REMOVED = {"run.accept": "start a new run from the parameters of another with run.init_from=RUN_FOLDER"}
"""Keys that there were, and what to do instead."""


def rename_overrides(command: str, overrides: Iterable[str]) -> list[str]:
    """Return the overrides of a command under the whole present names of their keys; warn of each former one."""
    former, short, result = RENAMED | RENAMED_IN.get(command, {}), SHORT.get(command, {}), []
    for override in overrides:
        found = re.match(r"([+~]*)([\w.]+)(.*)", override, flags=re.DOTALL)
        if found and (present := (former | short).get(found[2])):
            if found[2] in former:
                _warn(found[2], present)
            override = f"{found[1]}{present}{found[3]}"
        result.append(override)
    return result


def rename_keys(config: dict[str, Any], given: Collection[str] = (), *, warn: bool = True) -> None:
    """Rename the former keys of a configuration in place.

    Args:
        config: sections of keys.
        given: keys of the command line, which count more than those of files.
        warn: of each; nobody can change the file of a run.
    """
    for former, present in RENAMED.items():
        section, _, name = former.partition(".")
        node = config.get(section)
        if isinstance(node, dict) and name in node:
            value = node.pop(name)
            if warn:
                _warn(former, present)
            if present not in given:
                node[present.partition(".")[2]] = value


def drop_removed_keys(config: dict[str, Any]) -> dict[str, str]:
    """Delete removed keys from a configuration in place, and return a message for each."""
    messages = {}
    for key, instead in REMOVED.items():
        section, _, name = key.partition(".")
        node = config.get(section)
        if isinstance(node, dict) and name in node:
            messages[key] = f"{key}={node.pop(name)}: this key was removed; {instead}"
    return messages


_WARNED: dict[Any, Any] = {}
"""Warnings that were shown, as ``warnings`` keeps them for a module."""


def _warn(former: str, present: str) -> None:
    message = f"{former} is called {present} now; the former name will be removed."
    warnings.warn_explicit(message, FutureWarning, "configuration", 1, registry=_WARNED)  # no line of code is at fault
