"""Commands and keys, from the program itself."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from docs.blocks.accuracy import measured_accuracy
from docs.blocks.markdown import ROOT, table
from metalearn.algorithms import ALGORITHMS
from metalearn.commands.main import COMMANDS
from metalearn.config import commands_schema, schema
from metalearn.config.compose import compose, group_defaults
from metalearn.config.help import key_sections
from metalearn.config.messages import describe_allowed, description, format_value
from metalearn.training.tracking.tags import DESCRIPTIONS


def commands() -> str:
    """List the commands, with what their help says."""
    parts = []
    for name, function in COMMANDS.items():
        about = inspect.cleandoc(function.__doc__ or "").replace("``", "`")
        parts.append(f"### {name}\n\n```text\nmetalearn {name} [KEY=VALUE ...]\n```\n\n{about}")
    return "\n\n".join(parts)


def api_names() -> str:
    """List what the API page describes, with the first line of each docstring and its file."""
    rows = []
    for path in re.findall("^::: (.+)$", (ROOT / "docs/reference/api.md").read_text(encoding="utf-8"), re.MULTILINE):
        module, _, name = path.rpartition(".")
        item: Any = getattr(importlib.import_module(module), name)
        if isinstance(item, types.ModuleType) or typing.get_origin(item) or item is Any:
            continue  # a module, or a type: it has no docstring of its own
        about = inspect.cleandoc(item.__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")
        file = Path(inspect.getfile(inspect.unwrap(item))).relative_to(ROOT).as_posix()
        rows.append((f"[`{name}`](../../{file})", about))
    return table(("name", "what it is"), rows)


def keys(command: str) -> str:
    """Return every key of a command, by section; for others than ``train``, those that ``train`` has not."""
    known = [] if command == "train" else _sections("train")
    trained = {(title, key): value for title, found in known for key, _, value in found}
    parts = []
    for title, found in _sections(command):
        rows = [
            (f"`{key}`", f"`{_default(value)}`", f"{description(hint)} ({describe_allowed(hint)})")
            for key, hint, value in found
            if (title, key) not in trained or trained[title, key] != value
        ]
        if rows:
            parts.append(f"### {title.rstrip(':')}\n\n{table(('key', 'default', 'meaning'), rows)}")
    return "\n\n".join(parts)


def _sections(command: str) -> list[tuple[str, list[tuple[str, Any, Any]]]]:
    kinds = {**vars(commands_schema), "TrainConfig": schema.TrainConfig}
    kind = kinds[f"{command.capitalize()}Config"]
    plain: Any = OmegaConf.to_container(compose(command), resolve=False)
    return list(key_sections(kind, plain, group_defaults(kind)))


def _default(value: object) -> str:
    return "required" if value == "???" else format_value(value)


def algorithm(name: str) -> str:
    """Return what an algorithm does, its paper, its command, the settings of its file, and its measured accuracy."""
    about = inspect.cleandoc(ALGORITHMS[name].__doc__ or "").partition("\nArgs:")[0].partition("\nRaises:")[0].rstrip()
    settings = yaml.safe_load((ROOT / "conf" / "algorithm" / f"{name}.yaml").read_text(encoding="utf-8"))
    settings["algorithm"] = {k: v for k, v in settings["algorithm"].items() if k not in ("name", "backend")}
    own = [f"{section}.{key}={value}".lower() for section, keys in settings.items() for key, value in keys.items()]
    about = about.removeprefix("Build ").replace("``", "`")
    parts = [
        about[0].upper() + about[1:],
        f"```bash\npython scripts/train.py algorithm={name}\n```",
    ]
    if own:
        parts.append(f"Its file sets {', '.join(f'`{setting}`' for setting in own)}.")
    if measured := measured_accuracy(name):
        parts.append(measured)
    return "\n\n".join(parts)


def tags() -> str:
    """List TensorBoard's curves, with what it says of them."""
    readable = {r".+": "…", r"\w+": "accuracy", r"\d+": "k"}
    rows = []
    for pattern, text in DESCRIPTIONS:
        name = functools.reduce(lambda tag, change: tag.replace(*change), readable.items(), pattern)
        rows.append((f"`{name}`", text))
    return table(("tag", "what it is"), rows)
