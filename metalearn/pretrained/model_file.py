"""A trained model as one safetensors file: meta-parameters, the run's configuration, and the figures of its test.

Some are shipped in ``metalearn/pretrained/``. Wherever the folder of a run is asked for, such a file or the name of a
shipped one will do. Importing this needs no torch: a configuration is checked before torch is imported.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from metalearn.core.errors import RunError
from metalearn.core.json_files import read_metrics
from metalearn.core.paths import NoHomeError, expand_home
from metalearn.core.quoting import quote_word

if TYPE_CHECKING:
    from metalearn.core.types import Params

PRETRAINED = Path(__file__).parent
"""Folder of the models that are shipped."""

_FORMAT = "metalearn-model-1"
_DIGEST = "sha256"
_MAX_LISTED = 5


@dataclass(frozen=True)
class ModelRecord:
    """What a model file says about its tensors.

    Args:
        config_yaml: the configuration of the run, as its ``config.yaml``.
        iteration: meta-steps of training before the checkpoint.
        validation_score: of that checkpoint.
        card: about the test: what its ``metrics.json`` holds, and whatever was added; empty for an unfinished run.
    """

    config_yaml: str
    iteration: int
    validation_score: float
    card: Mapping[str, Any]


def pretrained_models() -> list[str]:
    """Return the names of the shipped models, as ``load`` takes them."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def find_run(run: str | Path) -> Path:
    """Return the path of a run's folder or of a model file; the name of a shipped model is that of its file.

    A run that exists under this path counts more than a name.

    Raises:
        RunError: if it is neither.
    """
    try:
        path = expand_home(run)
    except NoHomeError as error:
        raise RunError(str(error)) from None
    if path.is_file() or (path / "config.yaml").is_file():
        return path
    shipped = pretrained_models()
    if str(run) in shipped:
        return PRETRAINED / f"{run}.safetensors"
    if path.exists():
        raise RunError(f"{run}: not a run's folder, as it holds no config.yaml; {_runs_below(path)}")
    near = "".join(f" Did you mean {name}?" for name in difflib.get_close_matches(Path(run).name, shipped, n=1))
    raise RunError(
        f"{run}: there is no such folder of a run, and no such model.{near} Name a folder that training has made, a "
        f"file of Learner.export, or a shipped model ({', '.join(shipped) or 'none here'})."
    )


def _runs_below(folder: Path) -> str:
    """Return which runs lie in a folder, the latest first, for the message that it is none."""
    found = [file for depth in ("*", "*/*") for file in folder.glob(f"{depth}/config.yaml")]
    latest = sorted(found, key=lambda file: file.stat().st_mtime, reverse=True)[:_MAX_LISTED]
    if not latest:
        return "name one that training has made."
    return "\n".join(
        ["name one of those in it, the latest first:", *(f"  {quote_word(file.parent)}" for file in latest)]
    )


def read_record(path: Path) -> ModelRecord:
    """Return what a model file says about its tensors, without reading them.

    Raises:
        RunError: if it is damaged, or another kind of file.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return _parse(file.metadata() or {}, path)
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def read_card(run: Path, iteration: int) -> Mapping[str, Any]:
    """Return the card of a model file, or ``metrics.json`` of a run whose checkpoint of ``iteration`` was tested.

    Raises:
        RunError: if either is damaged.
    """
    if run.is_file():
        return read_record(run).card
    metrics = read_metrics(run) or {}
    return metrics if metrics.get("validation.best_iteration") == iteration else {}


def read_model(path: Path) -> tuple[Params, ModelRecord]:
    """Read meta-parameters to the CPU, and what the file says about them.

    Raises:
        RunError: if it is damaged, or another kind of file.
    """
    tensors, metadata = read_safetensors(path)
    record = _parse(metadata, path)
    check_digest(tensors, metadata, path)
    return tensors, record


def model_bytes(tensors: Params, record: ModelRecord) -> bytes:
    """Return the content of a model file."""
    metadata = {
        "format": _FORMAT,
        "config.yaml": record.config_yaml,
        "iteration": str(record.iteration),
        "validation_score": repr(record.validation_score),
        "card": json.dumps(record.card),
    }
    return safetensors_bytes(tensors, metadata)


def safetensors_bytes(tensors: Params, metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file with its digest: the same bytes for the same tensors and metadata.

    The library writes metadata in an order that changes from call to call.
    """
    import safetensors.torch

    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    content = safetensors.torch.save(tensors, {**metadata, _DIGEST: _digest(tensors, metadata)})
    end = 8 + int.from_bytes(content[:8], "little")  # a length of 8 bytes, a header of JSON, the tensors
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def read_safetensors(path: Path) -> tuple[Params, dict[str, str]]:
    """Read the tensors and the metadata of any safetensors file.

    The tensors are copies. The library's lie in the mapped file: they change with it, and at addresses that are no
    multiple of 64, where the last bits of a product may differ from those of the same tensors in torch's own memory.

    Raises:
        RunError: if it is missing or cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such file.") from None
    except (safetensors.SafetensorError, OSError, RuntimeError, TypeError) as error:  # torch has no tensor of that size
        raise _unreadable(path, error) from error
    return {name: t.clone() for name, t in tensors.items()}, metadata


def check_digest(tensors: Params, metadata: Mapping[str, str], path: Path) -> None:
    """Raise ``RunError`` if what was read from a file of ``safetensors_bytes`` is not what was written."""
    if metadata.get(_DIGEST) != _digest(tensors, metadata):
        raise RunError(f"{path} is damaged: the SHA-256 in it is that of another content. Copy it, or make it, again.")


def tensor_digest(tensors: Params) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bits."""
    import torch

    sha = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sha.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\n".encode())
        sha.update(t.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())  # numpy lacks bfloat16
    return sha.hexdigest()


def _digest(tensors: Params, metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of the tensors and of every other entry of the metadata."""
    text = json.dumps({name: value for name, value in metadata.items() if name != _DIGEST}, sort_keys=True)
    return hashlib.sha256((text + tensor_digest(tensors)).encode()).hexdigest()


def _parse(metadata: Mapping[str, str], path: Path) -> ModelRecord:
    if metadata.get("format") != _FORMAT:
        raise RunError(f"{path} holds no model of metalearn; name a file that Learner.export has written.")
    try:
        return ModelRecord(
            metadata["config.yaml"],
            int(metadata["iteration"]),
            float(metadata["validation_score"]),
            dict(json.loads(metadata["card"])),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: its metadata are incomplete ({error!r}). Copy it again.") from error


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} cannot be read as a safetensors file ({error}); it is damaged, or of another kind: name a file that "
        "Learner.export or Learner.save has written."
    )
