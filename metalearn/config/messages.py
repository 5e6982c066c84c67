"""A message for every error of the configuration, and the words that describe a key."""

from __future__ import annotations

import difflib
import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import Doc

from metalearn.config.key_types import LARGEST_SEED
from metalearn.core.quoting import format_assignment, format_override, quote_word

GROUPS = ("algorithm", "data", "model")
_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "booleans"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
}
_LIMITS = ((Ge, ", at least {:g}"), (Gt, " above {:g}"), (Le, " and at most {}"), (Lt, " and below {:g}"))


def section_classes(hint: Any) -> tuple[Any, ...]:
    """Return the classes of a section: one, or one for each option of its group; none for a key that is no section."""
    base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return tuple(c for c in (base, *get_args(base)) if is_dataclass(c))


@functools.cache
def hints(kind: Any) -> dict[str, Any]:
    """Return the annotated type of every key of a section, or of every section of a configuration."""
    found = get_type_hints(kind, include_extras=True)
    return {f.name: found[f.name] for f in fields(kind)}


def section_class(kind: type, section: str, name: object) -> type | None:
    """Return the class of a section, for its ``name`` where it is a group; ``None`` if it cannot be known."""
    classes: tuple[type, ...] = section_classes(hints(kind).get(section))
    if len(classes) > 1:
        classes = tuple(c for c in classes if name in get_args(get_args(hints(c)["name"])[0]))
    return classes[0] if classes else None


def description(hint: Any) -> str:
    """Return what a key means."""
    return next((str(mark.documentation) for mark in get_args(hint)[1:] if isinstance(mark, Doc)), "")


def describe_allowed(hint: Any, *, plural: bool = False) -> str:
    """Describe the values that a key may have."""
    base, marks = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    fields = [mark for mark in marks if isinstance(mark, FieldInfo)]
    limits = [limit for mark in marks for limit in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
    origin, arguments = get_origin(base), get_args(base)
    if examples := [example for mark in fields for example in mark.examples or ()]:
        return " or ".join([*([", ".join(examples[:-1])] if examples[1:] else []), examples[-1]])
    if origin in (Union, types.UnionType):
        if arguments[0] is bool or get_args(arguments[0])[:1] == (bool,):
            return f"one of false, true, {', '.join(get_args(arguments[1]))}"
        others = ["null" if other is type(None) else describe_allowed(other) for other in arguments[1:]]
        first = describe_allowed(arguments[0])
        return (", or " if "," in first else " or ").join([first, *others])
    if origin is Literal:
        choices = ", ".join(map(str, arguments))
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin is list and get_origin(arguments[0]) is Literal:
        return describe_allowed(arguments[0])
    if origin is list:
        least = next((limit.min_length for limit in limits if isinstance(limit, MinLen)), 0)
        most = next((limit.max_length for limit in limits if isinstance(limit, MaxLen)), None)
        number = str(least) if least == most else "one or more" if least else "a list of"
        example = ", as in [3]" if arguments[0] is int or get_args(arguments[0])[:1] == (int,) else ""
        return f"{number} {describe_allowed(arguments[0], plural=True)}{example}"
    if origin is dict:
        return "names with values, as {width: 32}"
    words = _WORDS[base][plural]
    return words + "".join(
        text.format(bound if (bound := getattr(limit, mark.__name__.lower())) != LARGEST_SEED else "2^63 - 1")
        for mark, text in _LIMITS
        for limit in limits
        if type(limit) is mark
    )


def format_value(value: Any) -> str:
    """Format a value as YAML does, as far as a message needs it: text that looks like a number stands in quotes."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    is_quoted = isinstance(value, str) and re.fullmatch(r"|true|false|null|[-+.\d][-+.\de]*", value)
    return repr(value) if is_quoted else str(value)


def format_errors(
    error: ValidationError, kind: type, plain: Mapping[str, Any], file_of: Callable[[str], str]
) -> dict[str, str]:
    """Return a message for every key at fault.

    Args:
        error: of the validation.
        kind: the schema.
        plain: the configuration, as it was validated.
        file_of: name the file that sets a key, as `` (in experiment/mine.yaml)``; empty for the command line.
    """
    messages: dict[str, str] = {}
    for each in error.errors(include_url=False):
        section, *inside = map(str, each["loc"])
        node: Any = plain.get(section)
        classes = section_classes(hints(kind).get(section))
        if len(classes) > 1 and inside:
            del inside[0]  # pydantic puts the option before the key
        if each["type"] == "union_tag_invalid":
            key = f"{section}.name"
            text = f"{key}={format_value(node['name'])}: must be {_options(classes)}; choose with {section}=NAME"
        elif each["type"] == "union_tag_not_found":
            key = f"{section}.name"
            text = f"{key} is required: choose with {section}=NAME {_options(classes)}"
        elif not classes:
            key, text = section, _format_key_error(each, section, node, kind, kind, file_of)
        elif not inside:
            key, text = section, _format_section_error(each["type"], section, node, classes)
        else:
            key, owner = f"{section}.{inside[0]}", section_class(kind, section, node.get("name")) or classes[0]
            text = _format_key_error(each, key, node.get(inside[0]), owner, kind, file_of)
        messages.setdefault(key, text)
    if kind_is_wrong := [key for key in messages if key.endswith(".name")]:  # the other keys are of another option
        wrong = tuple(key.removesuffix("name") for key in kind_is_wrong)
        messages = {key: m for key, m in messages.items() if key in kind_is_wrong or not key.startswith(wrong)}
    return messages


def _format_section_error(error: str, section: str, node: Any, classes: Sequence[type]) -> str:
    keys = ", ".join(dict.fromkeys(key for c in classes for key in hints(c)))
    if error != "missing":
        return f"{section}={format_value(node)}: must be a section, with the keys {keys}"
    how = f"choose with {section}=NAME {_options(classes)}" if len(classes) > 1 else f"a section with the keys {keys}"
    return f"{section} is required: {how}"


def _format_key_error(error: Any, key: str, value: Any, owner: type, kind: type, file_of: Callable[[str], str]) -> str:
    shown, hint = f"{key}={format_value(value)}", hints(owner).get(key.rpartition(".")[2])
    if error["type"] == "missing":
        return f"{key} is required: {description(hint)}"
    if error["type"] == "unexpected_keyword_argument":
        return f"{shown}: there is no such key{file_of(key)}. {_nearest(key, kind, list(hints(owner)))}"
    if error["type"] == "value_error":
        return f"{shown}: {error['ctx']['error']}{file_of(key)}"
    base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    words = [str(word) for word in get_args(base)] if get_origin(base) is Literal else []
    near = "".join(f" Did you mean {word}?" for word in difflib.get_close_matches(str(value), words, n=1))
    return f"{shown}: must be {describe_allowed(hint)}{file_of(key)} ({description(hint)}){'.' if near else ''}{near}"


def _options(classes: Sequence[type]) -> str:
    return "one of " + ", ".join(name for c in classes for name in get_args(get_args(hints(c)["name"])[0]))


def _nearest(key: str, kind: type, known: Sequence[str]) -> str:
    """Suggest the key that was probably meant, and list those of the section."""
    prefix, dot, last = key.rpartition(".")
    if key == "experiment":
        return "A file in experiment/ must open with the line '# @package _global_'."
    if not prefix:
        found = [s for s in known for c in section_classes(hints(kind)[s]) if key in hints(c)]
        if found:
            return f"Did you mean {' or '.join(f'{s}.{key}' for s in dict.fromkeys(found))}?"
    close = difflib.get_close_matches(last, known, n=1)
    hint = f"Did you mean {prefix}{dot}{close[0]}? " if close else ""
    return f"{hint}The keys{' of ' + prefix if prefix else ''} are {', '.join(known)}."


_SYNONYMS = {
    "epochs": "outer.iterations",
    "iters": "outer.iterations",
    "steps": "inner.steps",
    "meta_lr": "outer.lr",
    "batch_size": "task.meta_batch",
    "meta_batch_size": "task.meta_batch",
    "n_way": "task.ways",
    "way": "task.ways",
    "n_shot": "task.shots",
    "shot": "task.shots",
    "k_shot": "task.shots",
    "adapt_lr": "inner.lr",
    "adaptation_steps": "inner.steps",
    "order": "inner.second_order",
    "gpu": "run.device",
    "name": "experiment",
}
"""What other programs call a key."""
_OTHER_NAMES = {
    "fomaml": "inner.second_order=false",
    "first_order": "inner.second_order=false",
    "maml++": "algorithm=maml_pp",
    "mamlpp": "algorithm=maml_pp",
    "mamlplusplus": "algorithm=maml_pp",
    "mc": "algorithm=meta_curvature",
    "prototypical": "algorithm=protonet",
    "proto": "algorithm=protonet",
    **dict.fromkeys(("tieredimagenet", "cub", "folder"), "data=images data.root=FOLDER"),
    "miniimagenet": "data=images data.root=FOLDER data.class_split=mini_imagenet",
    "cifarfs": "data=torchvision data.dataset=CIFAR100 data.class_split=cifar_fs",
    "cifar100": "data=torchvision data.dataset=CIFAR100",
}
"""What other programs call an option of a group, without signs and capitals."""


def every_key(kind: type) -> list[str]:
    """Return the keys of a configuration, those of all options of its groups among them."""
    return [
        key
        for name, hint in hints(kind).items()
        for key in ([f"{name}.{k}" for c in section_classes(hint) for k in hints(c)] or [name])
    ]


def nearest_key(key: str, kind: type, *, exact: bool = False) -> str | None:
    """Return the key that was probably meant; ``None`` if none is near, or with ``exact`` if it is not one."""
    every = ["experiment", *every_key(kind), *(name for name in hints(kind) if name in GROUPS)]
    word = key.replace("-", "_")
    if word in every or exact:
        return word if word in every else None
    last = word.rpartition(".")[2]
    same = sorted({k for k in every if k.rpartition(".")[2] == last}, key=lambda k: (not k.startswith("run."), k))
    close = difflib.get_close_matches(word, every, n=1, cutoff=0.75)
    synonym = _SYNONYMS.get(word)
    return next(iter([*same, *([synonym] if synonym in every else []), *close]), None)


def _readable_override(override: str) -> str:
    key, _, value = override.partition("=")
    if not _KEY.fullmatch(key) or not value or value[0] in " =":
        return "Write KEY=VALUE without spaces, and KEY as a section and a name, with a dot between them."
    if value[0] in "[{" and value[-1] in "]}":
        return f"Quote the texts in it, as in \"{key}=['a=1','b=2']\"."
    text = format_assignment(key, value) if "${" not in value or "'" in value else f"{key}='{value}'"
    return f"A text is quoted twice, for Hydra and for the shell:\n  {quote_word(text)}"


_KEY = re.compile(r"~?[\w@:/-]+(\.[\w@:/-]+)*")


def format_hydra_error(error: Exception, overrides: Sequence[str]) -> str:
    """Return what Hydra or OmegaConf could not compose: the override or file, and what to write."""
    if isinstance(error, OverrideParseException):
        override = str(error.override).lstrip("+")
        return f"{override}: Hydra cannot read this.\n{_readable_override(override)}"
    if isinstance(error, yaml.YAMLError):
        return f"a YAML file cannot be read: {error}"
    if merging := re.match(r"Error merging override \+*(.*)", str(error)):
        return f"{merging[1]}: this cannot be composed: {str(error.__cause__).partition(chr(10))[0]}"
    text = re.sub(r"^In '\w+': |\nConfig search path:.*", "", str(error), flags=re.DOTALL).strip()
    text = text.replace("'++", "'") or type(error).__name__
    if found := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        key, values = found[1], found[2]
        return (
            f"{key}={values}: a list is written\n  {quote_word(f'{key}=[{values}]')}\nand a text that holds commas\n"
            f"  {quote_word(f'{key}={format_override(values)}')}\n--multirun runs once for each of the values."
        )
    if found := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, name, options = found[1], found[2], re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
        word = re.sub(r"[-_ ]", "", name.lower())
        plain = {re.sub("_", "", option): option for option in options}
        close = [plain[near] for near in difflib.get_close_matches(word, plain, n=1)]
        meant = _OTHER_NAMES.get(word) or "".join(f"{group}={option}" for option in close)
        text = f"{group}={name}: there is no such option. " + (f"Did you mean {meant}? " if meant else "")
        text += f"The options of {group} are {', '.join(options)}."
    named = any(override.partition("=")[0].lstrip("+~") in text for override in overrides)
    return text if named or not overrides else f"{' '.join(overrides)}: this cannot be composed: {text}"


def file_setting(key: str, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    """Return `` (in GROUP/NAME.yaml)`` for the chosen file that sets a key, or "" if none or the command line does."""
    names = [override.partition("=")[::2] for override in overrides]
    if key in [name.lstrip("+~") for name, _ in names]:
        return ""
    for name, value in names:
        group = name.lstrip("+")
        if found := next((f for folder in folders if (f := _sets(key, folder, group, value))), None):
            return f" (in {group}/{found}.yaml)"
    return ""


def _sets(key: str, folder: Path, group: str, name: str) -> str | None:
    """Return the name of a group's file, or of one that it builds on, that holds a key."""
    file = folder / group / f"{name}.yaml"
    try:
        content: Any = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
        if any(
            OmegaConf.select(content, k, default="absent") != "absent" for k in (key, key.removeprefix(f"{group}."))
        ):
            return name
        parents = [each for each in content.get("defaults") or [] if isinstance(each, str) and each != name]
    except Exception:  # a file that is no dictionary, say: the message goes without its name
        return None
    return next((found for each in parents if (found := _sets(key, folder, group, each))), None)
