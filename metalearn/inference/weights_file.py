"""Save and load adapted weights as a safetensors file that records which run they belong to.

The file holds every weight by its name, the support inputs as ``support::x`` (for non-transductive prediction), and as
metadata the classes, the steps, and the SHA-256 of the whole content and of the meta-parameters that were adapted.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.core import serialization as files
from metalearn.core.errors import RunError
from metalearn.core.types import Params
from metalearn.inner import SEPARATOR
from metalearn.pretrained.model_file import check_digest, read_safetensors, safetensors_bytes, tensor_digest

_FORMAT = "metalearn-adapted-2"
_FORMER_FORMAT = "metalearn-adapted-1"  # its SHA-256 is that of the tensors alone
SUPPORT_X = f"support{SEPARATOR}x"
"""The name of the support inputs in the file."""


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A model adapted to one task in ``steps`` inner steps.

    Weights are without a task dimension, support inputs ``[S, ...]``, classes sorted; a regression has none.
    """

    weights: Params
    support_x: Tensor
    classes: tuple[Any, ...]
    steps: int

    def contiguous_copy(self) -> AdaptedModel:
        """Return a contiguous copy: layout and alignment change how products round, and a file does not store them."""
        weights = {name: w.clone(memory_format=torch.contiguous_format) for name, w in self.weights.items()}
        support_x = self.support_x.clone(memory_format=torch.contiguous_format)
        return replace(self, weights=weights, support_x=support_x)


@dataclass(frozen=True)
class CheckpointOrigin:
    """The run that weights were adapted from; the SHA-256 of its meta-parameters alone identifies it."""

    run: str
    algorithm: str
    config_digest: str
    keys: Mapping[str, Any]
    theta_digest: str


def write_weights(adapted: AdaptedModel, origin: CheckpointOrigin, path: Path, *, overwrite: bool) -> None:
    """Write the file atomically; raise ``RunError`` if it exists already, or a label cannot be saved."""
    if odd := [one for one in adapted.classes if type(one) not in (str, int)]:
        raise RunError(
            f"label {odd[0]!r} is a {type(odd[0]).__name__}, and only strings and integers can be saved; adapt with "
            "such labels."
        )
    files.check_new_file(path, "adapted.safetensors", overwrite=overwrite)
    tensors = {**adapted.weights, SUPPORT_X: adapted.support_x}
    metadata = {
        "format": _FORMAT,
        "classes": json.dumps(adapted.classes),
        "steps": str(adapted.steps),
        "run": ascii(origin.run)[1:-1],
        "algorithm": origin.algorithm,
        "config": json.dumps(origin.keys),
        "config.sha256": origin.config_digest,
        "theta.sha256": origin.theta_digest,
    }
    files.atomic_write_bytes(path, safetensors_bytes(tensors, metadata))


def read_weights(path: Path, origin: CheckpointOrigin) -> AdaptedModel:
    """Read to the CPU what ``write_weights`` wrote, for the run ``origin``.

    Raises:
        RunError: if the file is missing, damaged or another format, or of another run; then with the differences.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") == _FORMAT:
        check_digest(tensors, metadata, path)
    elif metadata.get("format") != _FORMER_FORMAT:
        raise RunError(f"{path} holds no adapted weights of metalearn; name a file that a learner has saved.")
    elif metadata.get("content.sha256") != tensor_digest(tensors):
        raise RunError(f"{path} is damaged: the SHA-256 in it is that of other weights. Adapt again, or copy it again.")
    try:
        _check_same_run(path, metadata, origin)
        support_x = tensors.pop(SUPPORT_X)
        return AdaptedModel(tensors, support_x, _parse_classes(metadata["classes"]), _parse_steps(metadata["steps"]))
    except (KeyError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: its metadata are incomplete or wrong ({error}). Adapt again.") from error


def _parse_classes(text: str) -> tuple[Any, ...]:
    classes = json.loads(text)
    if type(classes) is not list or not all(type(one) in (str, int) for one in classes):
        raise ValueError(f"classes={reprlib.repr(classes)}: must be a list of strings or integers")
    if len({*classes}) < len(classes):
        raise ValueError(f"classes={reprlib.repr(classes)}: one stands there twice")
    return tuple(classes)


def _parse_steps(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"steps={reprlib.repr(text)}: must be a whole number from 0 to 999999999")
    return int(text)


def _check_same_run(path: Path, metadata: Mapping[str, str], origin: CheckpointOrigin) -> None:
    if metadata["theta.sha256"] == origin.theta_digest:
        return
    theirs, ours = json.loads(metadata["config"]), json.loads(json.dumps(origin.keys))
    if not isinstance(theirs, dict):
        raise ValueError(f"config={reprlib.repr(theirs)}: must be keys and their values")
    differ = [
        f"  {name}: {theirs.get(name)} in the file, {ours.get(name)} in the run"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    why = differ or ["  the configuration is the same; the run was trained again, or has a better checkpoint now"]
    raise RunError(
        "\n".join([f"{path} was adapted from {metadata['run']}, which is another model than {origin.run}:", *why])
        + "\nLoad that run, or adapt again."
    )
