"""What a user gives a learner: images, numbers and labels of many kinds, as tensors and lists of one kind."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalearn.core.errors import DataError

Examples = Tensor | NDArray[Any] | Sequence[Any]
"""Images or numbers: a tensor, an array, or a sequence of either (of Pillow's images too)."""

_SHOWN = 5


def as_images(images: Examples, shape: torch.Size) -> Tensor:
    """Images as a run's network takes them, ``[S, C, H, W]`` float32 in [0, 1].

    Args:
        images: ``[S, C, H, W]``, or ``[S, H, W]`` where C is 1; uint8, bool, or floating point in [0, 1].
        shape: ``[C, H, W]`` of the run.

    Raises:
        DataError: if there is none, or they are of another size, number of channels, dtype or range.
    """
    x = _as_tensor("images", images)
    if x.ndim == 3 and shape[0] == 1:
        x = x.unsqueeze(1)
    if x.shape[1:] != shape or x.ndim != 4:
        raise DataError(
            f"images are {_sizes(x.shape)}, and the run was trained on [images, channels, height, width] = "
            f"{_sizes(('any', *shape))}. {_remedy(x, shape)}"
        )
    _refuse_none("images", x)
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div(255)
    if x.dtype == torch.bool:
        return x.to(torch.float32)
    if not x.is_floating_point():
        raise DataError(f"images are {x.dtype}; give uint8 from 0 to 255, or floating point from 0 to 1.")
    x = x.to(torch.float32)
    _refuse_nonfinite("images", x)
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        raise DataError(
            f"images are from {low:g} to {high:g}, and must be in [0, 1]: divide by 255 what was read as bytes, leave "
            "out other normalisation, and .clip(0, 1) what resizing made a little larger."
        )
    return x


def as_numbers(name: str, values: Examples | Iterable[Any]) -> Tensor:
    """Inputs or targets of a regression as ``[S, 1]`` float32, from ``[S]`` or ``[S, 1]``.

    Raises:
        DataError: if there is none, or they are of another shape, or no finite numbers.
    """
    x = _as_tensor(name, values)
    if x.ndim == 1:
        x = x.unsqueeze(1)
    if x.ndim != 2 or x.shape[1] != 1:
        raise DataError(f"{name} are {_sizes(x.shape)}; the run was trained on single numbers: give [S] or [S, 1].")
    _refuse_none(name, x)
    if x.dtype == torch.bool or x.is_complex():
        raise DataError(f"{name} are {x.dtype}; give floating-point or whole numbers.")
    x = x.to(torch.float32)
    _refuse_nonfinite(name, x)
    return x


def as_labels(labels: Examples | Iterable[Any], count: int) -> list[Any]:
    """One label an image, as plain Python objects.

    Args:
        labels: any hashable things; a tensor, an array or a sequence of them.
        count: number of images.

    Raises:
        DataError: if there are more or fewer than images, or one cannot be hashed.
    """
    if isinstance(labels, (str, bytes)):
        raise DataError(f"labels={labels!r}: give one label an image, as in [{labels!r}, ...].")
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = [labels.tolist()] if labels.ndim == 0 else labels.tolist()
    plain = [one.item() if isinstance(one, (np.generic, Tensor)) and one.ndim == 0 else one for one in labels]
    if len(plain) != count:
        raise DataError(f"{len(plain)} labels for {count} images; give one label an image.")
    for one in plain:
        if not isinstance(one, Hashable):
            raise DataError(f"label {one!r} is a {type(one).__name__}; a label is one hashable thing, as 'cat' or 3.")
    return plain


def unique_classes(labels: Sequence[Any]) -> tuple[Any, ...]:
    """The different labels, sorted.

    Raises:
        DataError: if there is only one, or if they cannot be sorted.
    """
    different = set(labels)
    if len(different) < 2:
        raise DataError(
            f"all {len(labels)} images have the label {labels[0]!r}; there is nothing to tell apart with fewer than 2 "
            "classes."
        )
    try:
        return tuple(sorted(different))
    except TypeError:
        kinds = ", ".join(sorted({type(one).__name__ for one in different}))
        raise DataError(f"labels of several types ({kinds}) cannot be sorted; give all of one type.") from None


def class_indices(labels: Sequence[Any], classes: Sequence[Any]) -> Tensor:
    """Positions of labels among the classes, ``[S]`` int64.

    Raises:
        DataError: naming labels that are no classes.
    """
    place = {one: i for i, one in enumerate(classes)}
    unknown = list(dict.fromkeys(one for one in labels if one not in place))
    if unknown:
        known = ", ".join(map(repr, classes[:_SHOWN])) + (", ..." if len(classes) > _SHOWN else "")
        raise DataError(
            f"labels {', '.join(map(repr, unknown[:_SHOWN]))} are none of the {len(classes)} classes that were adapted "
            f"to ({known}). Remove such images, or adapt with examples of these classes."
        )
    return torch.tensor([place[one] for one in labels])


def _as_tensor(name: str, values: Examples | Iterable[Any]) -> Tensor:
    if (
        name == "images"
        and isinstance(values, (list, tuple))
        and any(isinstance(one, (str, PurePath)) for one in values)
    ):
        raise DataError(f"{name} are names of files; give pixels, as Learner.read(FOLDER).images has them.")
    try:
        if isinstance(values, Tensor):
            return values.detach()
        if isinstance(values, Sequence) and any(isinstance(one, Tensor) for one in values):
            return torch.stack([torch.as_tensor(one).detach() for one in values])
        # A copy: Pillow's memory cannot be written to, and torch takes no negative strides.
        return torch.from_numpy(np.array(values, order="C"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} cannot be made one tensor ({str(error).splitlines()[0]}); give an array or a tensor, or a "
            "sequence of those that are of one size and kind (Learner.read(FOLDER) makes files so)."
        ) from error


def _refuse_none(name: str, x: Tensor) -> None:
    if len(x) == 0:
        raise DataError(f"{name} are {_sizes(x.shape)}: there is none; give at least one.")


def _refuse_nonfinite(name: str, x: Tensor) -> None:
    broken = (~torch.isfinite(x)).flatten(1).any(dim=1).nonzero().flatten()
    if len(broken):
        raise DataError(f"{name} hold NaN or infinity, first at position {int(broken[0])}; remove or mend these.")


def _remedy(x: Tensor, shape: torch.Size) -> str:
    channels, height, width = shape
    if x.ndim == 4 and tuple(x.shape[1:]) == (height, width, channels):
        return "Put the channels first: images.transpose(0, 3, 1, 2), or .permute(0, 3, 1, 2) of a tensor."
    if tuple(x.shape) == tuple(shape):
        return "For a single one give images[None]."
    return "Resize or convert them; Learner.read(FOLDER) and scripts/adapt.py do so with files."


def _sizes(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
