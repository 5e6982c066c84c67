"""Adapted weights, in memory and as one safetensors file that says which run they belong to.

The file holds every weight by its name, the support inputs as ``support::x`` (by which queries are predicted one by
one), and as metadata the classes, the steps, and digests: of itself, and of the meta-parameters that were adapted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.types import Params
from metalearn.inner import SEPARATOR

_FORMAT = "metalearn-adapted-1"
_SUPPORT = f"support{SEPARATOR}x"


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A model that was adapted to one task.

    Args:
        weights: of the model, ``[...]`` each, without a task dimension.
        support_x: what it was adapted to, ``[S, ...]``.
        classes: labels by position, sorted; empty for a regression.
        steps: inner steps taken.
    """

    weights: Params
    support_x: Tensor
    classes: tuple[Any, ...]
    steps: int


@dataclass(frozen=True)
class CheckpointOrigin:
    """The run that weights were adapted from.

    Args:
        run: its folder.
        algorithm: its algorithm.
        config_digest: SHA-256 of its ``config.yaml``.
        keys: what is in there, by dotted key.
        theta_digest: SHA-256 of its meta-parameters, which alone makes it this run and no other.
    """

    run: str
    algorithm: str
    config_digest: str
    keys: Mapping[str, Any]
    theta_digest: str


def digest(tensors: Params) -> str:
    """SHA-256 of names, shapes and bits."""
    sha = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sha.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\n".encode())
        sha.update(t.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def write(adapted: AdaptedModel, origin: CheckpointOrigin, path: Path, *, overwrite: bool) -> None:
    """Write the file whole, or not at all.

    Raises:
        RunError: if there is one already and ``overwrite`` is false, or if a label is neither text nor a whole number.
    """
    if odd := [one for one in adapted.classes if type(one) not in (str, int)]:
        raise RunError(
            f"label {odd[0]!r} is a {type(odd[0]).__name__}, and a file keeps labels that are text or whole numbers; "
            "adapt with such labels to save."
        )
    check_not_exists(path, overwrite=overwrite)
    tensors = {**adapted.weights, _SUPPORT: adapted.support_x}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {
        "format": _FORMAT,
        "classes": json.dumps(adapted.classes),
        "steps": str(adapted.steps),
        "run": ascii(origin.run)[1:-1],
        "algorithm": origin.algorithm,
        "config": json.dumps(origin.keys),
        "config.sha256": origin.config_digest,
        "theta.sha256": origin.theta_digest,
        "content.sha256": digest(tensors),
    }
    files.atomic_write_bytes(path, safetensors.torch.save(tensors, metadata))


def check_not_exists(path: Path, *, overwrite: bool = False) -> None:
    """Refuse to write over something.

    Raises:
        RunError: if it is there and may not be overwritten, or is a folder.
    """
    if path.is_dir():
        raise RunError(f"{path} is a folder; name a file in it, as {path / 'adapted.safetensors'}.")
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists, and is not overwritten; remove it, or choose another name.")


def read(path: Path, origin: CheckpointOrigin) -> AdaptedModel:
    """Read what ``write`` wrote, into main memory.

    Args:
        path: the file.
        origin: the run that it is wanted for.

    Raises:
        RunError: if it is missing, damaged, something else, or of another run; then with what differs.
    """
    try:
        tensors, metadata = _opened(path)
        if metadata.get("format") != _FORMAT:
            raise RunError(f"{path} holds no adapted weights of metalearn; name a file that a learner has saved.")
        if digest(tensors) != metadata["content.sha256"]:
            raise RunError(f"{path} is damaged: the SHA-256 in it is of other weights. Adapt again, or copy it again.")
        _refuse_other_origin(path, metadata, origin)
        support_x = tensors.pop(_SUPPORT)
        return AdaptedModel(tensors, support_x, tuple(json.loads(metadata["classes"])), int(metadata["steps"]))
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: what it says of itself is not whole ({error}). Adapt again.") from error


def _opened(path: Path) -> tuple[Params, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such file of adapted weights.") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read as a safetensors file ({error}); it is damaged, or another.") from error


def _refuse_other_origin(path: Path, metadata: Mapping[str, str], origin: CheckpointOrigin) -> None:
    if metadata["theta.sha256"] == origin.theta_digest:
        return
    theirs, ours = json.loads(metadata["config"]), json.loads(json.dumps(origin.keys))
    differ = [
        f"  {name}: {theirs.get(name)} in the file, {ours.get(name)} in the run"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    why = differ or ["  the configuration is the same; the run was trained again, or went on to a better checkpoint"]
    raise RunError(
        "\n".join([f"{path} was adapted from {metadata['run']}, which is another model than {origin.run}:", *why])
        + "\nLoad that run, or adapt again."
    )
