"""A user's own code, named ``MODULE:NAME`` in a configuration: check the name, import it, call it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from metalearn.core.errors import ConfigError

_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


def check_target(target: str) -> str:
    """Return a target that has the form ``MODULE:NAME``.

    Raises:
        ValueError: if it has not.
    """
    if not re.fullmatch(f"{_NAME}:{_NAME}", target):
        raise ValueError(
            "must be MODULE:NAME, as in my_package.nets:MyNet: a module that can be imported, or a file in the "
            "working directory (without .py), and a class or function in it"
        )
    return target


def target_errors(targets: Mapping[str, str]) -> list[str]:
    """Import every class and function that a configuration names, by key; return what is wrong with them.

    A command does this first: data may take minutes to read, and what a module does to the random generators when it is
    imported comes before they are seeded.
    """
    messages = []
    for key, target in targets.items():
        try:
            import_target(key, target)
        except ConfigError as error:
            messages.append(str(error))
    return messages


def import_targets(targets: Mapping[str, str]) -> None:
    """Import every class and function that a configuration names; raise ``ConfigError`` for what is not there."""
    if messages := target_errors(targets):
        raise ConfigError("\n".join(messages))


def import_target(key: str, target: str) -> Callable[..., Any]:
    """Import the class or function that a key names.

    The working directory is searched first from then on, as under ``python -m``: a module may import another later.

    Args:
        key: ``model.target``, for messages.
        target: ``MODULE:NAME``.

    Raises:
        ConfigError: if there is no such module, nothing of this name in it, or it cannot be called.
        ImportError: from inside the module, if what that imports is missing.
    """
    module_name, _, name = target.partition(":")
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another that is not
        raise ConfigError(f"{key}={target}: {_not_found(error.name)}") from None
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{key}={target}: {module_name} has no {name}.{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{key}={target}: this is a {type(found).__name__}; name a class or a function")
    return found


def call_target(key: str, target: str, options: Mapping[str, Any], *arguments: Any, **offered: Any) -> Any:
    """Call what a key names with its options.

    Args:
        key: ``model.target``, for messages.
        target: ``MODULE:NAME``.
        options: keyword arguments.
        arguments: positional ones.
        offered: keyword arguments that are given if the function has parameters of these names and no options.

    Raises:
        ConfigError: if the options do not fit the function's parameters, or as ``import_target``.
    """
    function = import_target(key, target)
    names = parameter_names(function)
    given = {name: value for name, value in offered.items() if name in names and name not in options}
    try:
        inspect.signature(function).bind(*arguments, **given, **options)
    except TypeError as error:
        where = key.replace("target", "options")
        raise ConfigError(
            f"{where}={dict(options)}: {target} cannot be called with these ({error}); its parameters are "
            f"{', '.join(names) or 'none'}"
        ) from None
    except ValueError:  # a function that is not written in Python has no signature
        pass
    return function(*arguments, **given, **options)


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's parameters; none if they cannot be known."""
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:
        return []


def _not_found(module: str) -> str:
    return (
        f"there is no module {module}; it is looked for in the working directory ({os.getcwd()}) and among the "
        "installed packages. Start in the folder that holds it, install it, or add its folder to PYTHONPATH"
    )
