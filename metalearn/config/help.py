"""The text of ``--help``, the keys that matter first, and of ``--help-all``, every key by section."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metalearn.config.messages import (
    describe_allowed,
    description,
    every_key,
    format_value,
    hints,
    section_class,
    section_classes,
)
from metalearn.core.text import wrap

_TRAINING = (
    *("inner.second_order", "inner.steps", "inner.lr", "inner.engine", "task.ways", "task.shots", "outer.iterations"),
    *("outer.lr", "algorithm", "data", "data.root", "run.seed"),
)
_COMPARISON = (
    *("compare.variants", "compare.seeds", "compare.jobs"),
    *("task.ways", "task.shots", "outer.iterations", "data"),
)
MAIN_KEYS = {
    "train": _TRAINING,
    "compare": _COMPARISON,
    "benchmark": ("bench.kind", "bench.setting", "bench.repeats", "run.device", "run.threads"),
}
"""Keys of ``--help``, for commands with more than a screen can show; a section's name stands for its option."""
_FLAGS = {
    "--help-all": "every key",
    "--cfg job": "print the configuration, and do nothing",
    "--multirun": "one job for every value: run.seed=0,1,2",
    "hydra.run.dir=PATH": "folder of the output",
    "experiment=NAME": "the keys of conf/experiment/NAME.yaml",
}


def help_text(
    config: DictConfig,
    kind: type,
    start: str,
    about: str,
    options: Mapping[str, DictConfig],
    *,
    main: Sequence[str] = (),
    width: int = 80,
) -> str:
    """Return the keys of a command with their defaults, meanings and ranges.

    Args:
        config: composed, without overrides.
        kind: its schema.
        start: the words that start the command.
        about: what it does.
        options: sections of the groups' options, by ``GROUP=OPTION``.
        main: the keys to show; empty for all of them.
        width: of a line, in characters.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False)
    paragraphs = "\n\n".join(" ".join(one.split()) for one in inspect.cleandoc(about).split("\n\n"))
    lines = [f"usage: {start} [KEY=VALUE ...]", "", *wrap(paragraphs, width)]
    if main:
        count = len(set(every_key(kind)))
        lines += ["", f"The keys that matter first; --help-all shows all {count}:"]
        lines += [line for key in main for line in _main_key(key, kind, plain, options, width)]
    else:
        for title, keys in key_sections(kind, plain, options):
            lines += ["", title, *(line for key, hint, value in keys for line in _entry(key, hint, value, width))]
    flags = {name: text for name, text in _FLAGS.items() if main or name != "--help-all"}
    if not options:
        flags.pop("experiment=NAME")
    lines += ["", "Besides:", *(f"  {name:<20}{text}" for name, text in flags.items())]
    return "\n".join(lines)


def key_sections(
    kind: type, plain: Mapping[str, Any], options: Mapping[str, DictConfig]
) -> Iterator[tuple[str, list[tuple[str, Any, Any]]]]:
    """Yield the title and the keys of every section: names, hints and default values."""
    sections = {name: classes for name, hint in hints(kind).items() if (classes := section_classes(hint))}
    if top := [(name, hint, plain[name]) for name, hint in hints(kind).items() if name not in sections]:
        yield "Keys, with their defaults:", top
    for name, classes in sections.items():
        if len(classes) == 1:
            about = inspect.cleandoc(classes[0].__doc__ or "").partition("\n")[0].rstrip(".")
            yield f"{about}:", [(f"{name}.{key}", hint, plain[name][key]) for key, hint in hints(classes[0]).items()]
    for choice, node in options.items():
        group = choice.partition("=")[0]
        owner = section_class(kind, group, node.name)
        assert owner is not None
        values: Any = OmegaConf.to_container(node, resolve=False)
        yield f"With {choice}:", [(f"{group}.{key}", hint, values[key]) for key, hint in hints(owner).items()]


def _main_key(
    key: str, kind: type, plain: Mapping[str, Any], options: Mapping[str, DictConfig], width: int
) -> list[str]:
    section, _, last = key.partition(".")
    if not last:  # a group
        names = [choice.partition("=")[2] for choice in options if choice.startswith(f"{key}=")]
        return [f"  {key}={plain[key]['name']}", *_meaning(f"one of {', '.join(names)}", width)]
    owner = section_class(kind, section, plain[section].get("name"))
    assert owner is not None
    return list(_entry(key, hints(owner)[last], plain[section][last], width))


def _entry(key: str, hint: Any, value: Any, width: int) -> Iterator[str]:
    """Yield a key with its default value on one line, and its meaning and range below it."""
    default = "(required)" if value == "???" else re.sub(r"[$]{oc.env:(\w+),null}", r"$\1", format_value(value))
    yield f"  {key}={default}"
    yield from _meaning(f"{description(hint)} ({describe_allowed(hint)})", width)


def _meaning(text: str, width: int) -> list[str]:
    return wrap(text, width, indent=" " * 6)
