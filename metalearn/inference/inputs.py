"""Convert images, numbers and labels of many types to tensors and lists; raise ``DataError`` for what does not fit."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metalearn.config.options import DataConfig, ImagesConfig, SinusoidConfig, TorchvisionConfig
from metalearn.core.errors import DataError
from metalearn.core.text import plural
from metalearn.data.omniglot import SIZE

Examples = Tensor | NDArray[Any] | Sequence[Any]
"""Images or numbers: a tensor, an array, or a sequence of either (or of Pillow images)."""

_MAX_LISTED = 5


def example_shape(data: DataConfig) -> torch.Size:
    """Return the shape of one input of a run, ``[channels, height, width]`` or ``[1]``; no data set is read."""
    if isinstance(data, (ImagesConfig, TorchvisionConfig)):
        return torch.Size([data.channels, data.size, data.size])
    return torch.Size([1]) if isinstance(data, SinusoidConfig) else torch.Size([1, SIZE, SIZE])


def as_images(images: Examples, shape: torch.Size) -> Tensor:
    """Return images in the format of a run's network, ``[S, C, H, W]`` float32 in [0, 1].

    Args:
        images: ``[S, C, H, W]``, or ``[S, H, W]`` where C is 1; uint8, bool, or floating point in [0, 1].
        shape: ``[C, H, W]`` of the run.

    Raises:
        DataError: if there are none, or their size, number of channels, dtype or range does not fit.
    """
    x = _as_tensor("images", images)
    if x.ndim == 3 and shape[0] == 1:
        x = x.unsqueeze(1)
    if x.shape[1:] != shape or x.ndim != 4:
        raise DataError(
            f"images are {_format_shape(x.shape)}, and the run was trained on [images, channels, height, width] = "
            f"{_format_shape(('any', *shape))}. {_shape_hint(x, shape)}"
        )
    _check_not_empty("images", x)
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div(255)
    if x.dtype == torch.bool:
        return x.to(torch.float32)
    if not x.is_floating_point():
        raise DataError(f"images are {x.dtype}; give uint8 from 0 to 255, or floating point from 0 to 1.")
    x = x.to(torch.float32)
    _check_finite("images", x)
    low, high = x.min().item(), x.max().item()
    if low < 0 or high > 1:
        raise DataError(
            f"images are from {low:g} to {high:g}, and must be in [0, 1]: divide bytes by 255, leave out other "
            "normalisation, and .clip(0, 1) the overshoot of resizing."
        )
    return x


def as_numbers(name: str, values: Examples | Iterable[Any], shape: Sequence[int] = (1,)) -> Tensor:
    """Return inputs or targets as ``[S, *shape]`` float32; single numbers may be ``[S]``.

    Args:
        name: for messages.
        values: finite numbers; bytes of images, ``[S, channels, height, width]`` uint8, are divided by 255.
        shape: of one of them.

    Raises:
        DataError: if there are none, their shape is another, or they are not finite numbers.
    """
    x = _as_tensor(name, values)
    if x.ndim == 1 and list(shape) == [1]:
        x = x.unsqueeze(1)
    if list(x.shape[1:]) != list(shape):
        form = "single numbers: give [S] or [S, 1]" if list(shape) == [1] else _format_shape(("any", *shape))
        raise DataError(f"{name} are {_format_shape(x.shape)}; the run was trained on {form}.")
    _check_not_empty(name, x)
    if x.dtype == torch.bool or x.is_complex():
        raise DataError(f"{name} are {x.dtype}; give floating-point or whole numbers.")
    x = x.to(torch.float32).div(255) if x.dtype == torch.uint8 and len(shape) == 3 else x.to(torch.float32)
    _check_finite(name, x)
    return x


def as_targets(values: Examples | Iterable[Any], count: int, size: int = 1) -> Tensor:
    """Return the targets of ``count`` inputs of a regression, ``[count, size]`` float32.

    Raises:
        DataError: if there are more or fewer than inputs, or as ``as_numbers``.
    """
    y = as_numbers("targets", values, (size,))
    if len(y) != count:
        raise DataError(f"{plural(len(y), 'target')} for {plural(count, 'input')}; give one target an input.")
    return y


def as_labels(labels: Examples | Iterable[Any], count: int) -> list[Any]:
    """Return one hashable label for each of ``count`` images, as plain Python objects."""
    if isinstance(labels, (str, bytes)):
        raise DataError(f"labels={labels!r}: give one label an image, as in [{labels!r}, ...].")
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = [labels.tolist()] if labels.ndim == 0 else labels.tolist()
    plain = [one.item() if isinstance(one, (np.generic, Tensor)) and one.ndim == 0 else one for one in labels]
    if len(plain) != count:
        raise DataError(f"{plural(len(plain), 'label')} for {plural(count, 'image')}; give one label an image.")
    for one in plain:
        if not isinstance(one, Hashable):
            raise DataError(f"label {one!r} is a {type(one).__name__}; a label must be hashable, as 'cat' or 3.")
    return plain


def unique_classes(labels: Sequence[Any]) -> tuple[Any, ...]:
    """Return the different labels, sorted; at least two."""
    different = set(labels)
    if len(different) < 2:
        raise DataError(
            f"every image has the label {labels[0]!r}; there is nothing to tell apart with fewer than 2 classes."
        )
    try:
        return tuple(sorted(different))
    except TypeError:
        kinds = ", ".join(sorted({type(one).__name__ for one in different}))
        raise DataError(f"labels of several types ({kinds}) cannot be sorted; give all of one type.") from None


def class_indices(labels: Sequence[Any], classes: Sequence[Any]) -> Tensor:
    """Return the positions of labels in ``classes``, ``[S]`` int64."""
    index = {one: i for i, one in enumerate(classes)}
    unknown = list(dict.fromkeys(one for one in labels if one not in index))
    if unknown:
        known = ", ".join(map(repr, classes[:_MAX_LISTED])) + (", ..." if len(classes) > _MAX_LISTED else "")
        raise DataError(
            f"labels {', '.join(map(repr, unknown[:_MAX_LISTED]))} are none of the {len(classes)} classes that were "
            f"adapted to ({known}). Remove such images, or adapt with examples of these classes."
        )
    return torch.tensor([index[one] for one in labels])


def _as_tensor(name: str, values: Examples | Iterable[Any]) -> Tensor:
    is_list = isinstance(values, (list, tuple))
    if name == "images" and is_list and any(isinstance(one, (str, PurePath)) for one in values):
        raise DataError(f"{name} are names of files; give pixels, such as Learner.read(FOLDER).images.")
    try:
        if isinstance(values, Tensor):
            return values.detach()
        if isinstance(values, Sequence) and any(isinstance(one, Tensor) for one in values):
            return torch.stack([torch.as_tensor(one).detach() for one in values])
        # Copy: Pillow's memory is read-only, and torch does not support negative strides.
        return torch.from_numpy(np.array(values, order="C"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name} cannot be converted to one tensor ({str(error).splitlines()[0]}); give an array, a tensor, or a "
            "sequence of these of one shape and type (Learner.read(FOLDER) resizes files)."
        ) from error


def _check_not_empty(name: str, x: Tensor) -> None:
    if len(x) == 0:
        raise DataError(f"{name} are {_format_shape(x.shape)}: there is none; give at least one.")


def _check_finite(name: str, x: Tensor) -> None:
    broken = (~torch.isfinite(x)).flatten(1).any(dim=1).nonzero().flatten()
    if len(broken):
        raise DataError(f"{name} hold NaN or infinity, first at position {int(broken[0])}; remove or correct these.")


def _shape_hint(x: Tensor, shape: torch.Size) -> str:
    channels, height, width = shape
    if x.ndim == 4 and tuple(x.shape[1:]) == (height, width, channels):
        return "Put the channels first: images.transpose(0, 3, 1, 2), or .permute(0, 3, 1, 2) of a tensor."
    if tuple(x.shape) == tuple(shape):
        return "For a single one give images[None]."
    return "Resize or convert them; Learner.read(FOLDER) and scripts/adapt.py do so with files."


def _format_shape(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
