"""Find a data set of ``torchvision.datasets`` by name, and open its parts: train and test, or what it calls them."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any

from torchvision import datasets

from metalearn.core.errors import DataError, MetalearnError
from metalearn.core.text import first_line, preview_names

_SPLITS = ("train", "trainval", "val", "valid", "test")
_NOT_OPTIONS = {"root": "give data.root instead", "download": "fetch the data set first, with torchvision"}
_REFUSED = {
    "Omniglot": "its two parts have different classes; take data=omniglot, which joins them",
    **dict.fromkeys(("ImageFolder", "DatasetFolder"), "take data=images"),
    **dict.fromkeys(("LSUN", "LSUNClass"), "it unpickles a file of the working directory, which may run any code"),
}


def find_dataset(dataset: str, options: Mapping[str, Any]) -> Any:
    """Return a class of ``torchvision.datasets``; no file is looked for.

    Raises:
        DataError: if there is no such class, or it cannot be called with these options.
    """
    base = datasets.VisionDataset
    known = {n: c for n, c in vars(datasets).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    what = f"data.dataset={dataset}"
    if dataset not in known:
        plain = {name.lower(): name for name in known}
        near = difflib.get_close_matches(re.sub(r"[\W_]", "", dataset.lower()), plain, n=1)
        hint = f"Did you mean {plain[near[0]]}?" if near else f"It has {', '.join(sorted(known))}"
        raise DataError(f"{what}: torchvision.datasets has no such data set. {hint}")
    kind: Any = known[dataset]
    if dataset in _REFUSED:
        raise DataError(f"{what}: {_REFUSED[dataset]}")
    parameters = _parameters(kind)
    code = ("loader", "is_valid_file", "extensions")
    taken = [name for name in parameters if name not in (*_NOT_OPTIONS, *code) and "transform" not in name]
    for name in options:
        if name in _NOT_OPTIONS:
            raise DataError(f"data.options.{name}: {_NOT_OPTIONS[name]}")
        if name not in taken:
            raise DataError(f"data.options.{name}: {dataset} has no such argument; it has {', '.join(taken) or 'none'}")
    required = [name for name in taken if parameters[name].default is Parameter.empty]
    if missing := [f"data.options.{name}=VALUE" for name in required if name not in options]:
        raise DataError(f"{what}: it needs more arguments; give {' '.join(missing)}")
    return kind


def open_parts(kind: Any, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Open every part of a data set, or the one that ``train`` or ``split`` in the options chooses.

    Returns:
        each part by name.

    Raises:
        DataError: if its files are missing or damaged, or it does not take the options.
    """
    parameters = _parameters(kind)
    arguments = {"root": str(folder), **options} if "root" in parameters else dict(options)
    if "train" in parameters and not {"train", "what"} & {*options}:  # "what" of QMNIST is a part as well
        flags = {"train": True, "test": False}
        return {name: _open(kind, {**arguments, "train": flag}, options) for name, flag in flags.items()}
    if "train" in parameters or "split" in options or "split" not in parameters:
        return {"data": _open(kind, arguments, options)}
    parts: dict[str, Any] = {}
    for name in _SPLITS:
        if name == "trainval" and "train" in parts:
            continue  # it is train and val together
        try:
            parts[name] = _open(kind, {**arguments, "split": name}, options)
        except UnknownSplitError:
            continue
    if not {"train", "trainval"} & {*parts}:
        raise DataError(
            f"data.dataset={kind.__name__}: it has no part called train; name one, as torchvision documents them, with "
            "data.options.split=NAME"
        )
    return parts


class UnknownSplitError(DataError):
    """A data set has no part of this name."""


def _parameters(kind: Any) -> dict[str, Parameter]:
    """Return the parameters of a class, those of its bases among them where ``**kwargs`` passes these on."""
    found: dict[str, Parameter] = {}
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            _, *own = inspect.signature(cls.__init__).parameters.values()
            found = {p.name: p for p in own if p.kind is not Parameter.VAR_KEYWORD} | found
            if all(p.kind is not Parameter.VAR_KEYWORD for p in own):
                break
    return found


def _open(kind: Any, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Construct a data set from what is on disk; ``options`` are those of the arguments that the user gave."""
    can_download = "download" in _parameters(kind)
    try:
        data = kind(**arguments, **({"download": False} if can_download else {}))  # some download unless they are told
        len(data)
        return data
    except MetalearnError:  # a signal
        raise
    except Exception as error:  # each data set raises its own
        name, folder = kind.__name__, arguments.get("root")
        reason = first_line(error).rstrip(".")
        if isinstance(error, ValueError) and "argument split" in reason:
            raise UnknownSplitError(f"data.options.split={arguments['split']}: {reason}") from error
        if isinstance(error, ImportError) or "pip install" in reason or "h5py" in reason:
            raise DataError(f"data.dataset={name}: torchvision needs another package for it ({reason})") from error
        if folder is None or (options and isinstance(error, (TypeError, ValueError))):
            raise DataError(f"data.dataset={name}: torchvision cannot take these data.options ({reason})") from error
        call = f"torchvision.datasets.{name}({folder!r}, ..., download=True)"
        raise DataError(
            f"data.dataset={name}: torchvision cannot open it ({reason}). It looks in data.root={folder}"
            f"{_expected_files(kind, Path(folder))}. "
            + (f"Fetch what is missing or damaged by {call}" if can_download else "Put the files there")
            + ", or name another data.root"
        ) from error


def _expected_files(kind: Any, folder: Path) -> str:
    """Describe which files a data set lacks: by its own list if it has one, as CIFAR-100, else as it is documented."""
    listed = [*getattr(kind, "train_list", ()), *getattr(kind, "test_list", ())]
    if listed:
        files = [folder / kind.base_folder / name for name, _ in listed]
        missing = [str(file) for file in files if not file.is_file()]
        return f"; missing: {preview_names(missing)}" if missing else ", where all are, but not as published"
    for cls in kind.__mro__:
        if found := re.search(r"root \(.*?\): (.*?)\n(?: +\w+ \([a-z]|\s*\n|\s*$)", cls.__doc__ or "", re.DOTALL):
            return f" ({' '.join(found[1].split()).rstrip('.')})"
    return ""
