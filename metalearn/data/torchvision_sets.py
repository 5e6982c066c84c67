"""Data sets of ``torchvision.datasets`` as few-shot classes: all parts (train, test) joined, then split by class."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from metalearn.core.errors import DataError, MetalearnError
from metalearn.core.paths import expand_home
from metalearn.core.text import first_line
from metalearn.data.class_split import ClassSplit, check_split_sizes, log_classes_left_out, split_classes
from metalearn.data.image_decoding import ImageFormat, to_pixels
from metalearn.data.metadata import cache_dir
from metalearn.data.splits import ClassSizes, ImageSplits
from metalearn.data.torchvision_parts import find_dataset, open_parts

_LARGEST_SHARE = 0.5  # of the free memory: while they are split the images are held twice
_GIB = 2**30


def load_torchvision_splits(
    dataset: str,
    root: str | Path | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    size: int = 84,
    channels: int = 3,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    class_split: ClassSplit = None,
    ways: int = 1,
    needed: Mapping[str, int] | None = None,
) -> ImageSplits:
    """Load a data set of torchvision, split by class. It is read and decoded at every call.

    Args:
        dataset: a class of ``torchvision.datasets`` whose examples are an image and a whole number.
        root: folder that torchvision looks in; ``None`` for ``torchvision`` in the cache.
        options: keyword arguments of the class; ``train`` or ``split`` chooses one part.
        size: height and width to resize to, in pixels.
        channels: 1 for grey, 3 for colour.
        fractions: of the classes for training, validation and test.
        seed: of that split.
        class_split: names of the classes of each split, instead: as ``read_class_split`` takes them.
        ways: minimum number of classes in each split.
        needed: minimum number of images in each class of a split, by split; 1 by default.

    Raises:
        DataError: if there is no such data set, its files are missing, its examples are others, it is too large for the
            memory or too small for the task, or the class split does not fit.
        ValueError: if a setting is out of range.
    """
    fmt, options, source = ImageFormat(size, channels), options or {}, f"data.dataset={dataset}"
    kind = find_dataset(dataset, options)
    try:
        folder = expand_home(root).absolute() if root else cache_dir() / "torchvision"
    except RuntimeError as error:  # the home of an unknown user
        raise DataError(f"data.root={root}: {error}") from error
    if root and not folder.is_dir():
        raise DataError(f"data.root={root}: there is no such folder")
    images, by_class = _read_all(open_parts(kind, folder, options), fmt, source)
    splits = split_classes([*by_class], source, fractions=fractions, seed=seed, class_split=class_split)
    sizes = {split: [(name, len(by_class[name])) for name in names] for split, names in splits.items()}
    check_split_sizes(sizes, source, ways=ways, needed=needed or dict.fromkeys(splits, 1))
    log_classes_left_out([*by_class], splits, class_split)
    train, validation, test = (images[[i for name in names for i in by_class[name]]] for names in splits.values())
    return ImageSplits(
        dataset, train, validation, test, ClassSizes(*([n for _, n in classes] for classes in sizes.values()))
    )


def _read_all(parts: Mapping[str, Any], fmt: ImageFormat, source: str) -> tuple[Tensor, dict[str, list[int]]]:
    """Decode all images, ``[total, channels, size, size]``; return the numbers of those of each class, too.

    One after the other: a data set may draw from the global random generator, as FakeData does.
    """
    total = sum(map(len, parts.values()))
    shape = (total, fmt.channels, fmt.size, fmt.size)
    needed, free = np.prod(shape, dtype=np.int64), psutil.virtual_memory().available
    if needed > _LARGEST_SHARE * free:
        raise DataError(
            f"{source}: its {total} images of {fmt.size} x {fmt.size} pixels take {needed / _GIB:.3g} GiB, and "
            f"{free / _GIB:.3g} GiB of memory are free, of which at most half is taken. Lower data.size, take "
            "data.channels=1, or one part alone (data.options.train or data.options.split)"
        )
    images, by_class = torch.empty(shape, dtype=torch.uint8), dict[str, list[int]]()
    pixels = images.numpy()
    for number, (image, name) in enumerate(track(_examples(parts, source), "Reading images", total=total)):
        pixels[number] = to_pixels(image, fmt)
        by_class.setdefault(name, []).append(number)
    return images, dict(sorted(by_class.items()))


def _examples(parts: Mapping[str, Any], source: str) -> Iterator[tuple[Image.Image, str]]:
    """Yield every image and the name of its class, or the number of the class if it has none.

    Raises ``DataError`` for an image that cannot be read, and an example that is no image with a whole number.
    """
    for part, data in parts.items():
        classes = _class_names(data)
        for index in range(len(data)):
            try:
                example = data[index]
            except MetalearnError:  # a signal
                raise
            except Exception as error:  # Pillow's readers raise many kinds for a broken file
                reason = first_line(error).rstrip(".")
                raise DataError(
                    f"{source}: example {index} of {part} cannot be read ({reason}). Check its file, and data.options"
                ) from error
            label = _label(example)
            if label is None:
                values = example if isinstance(example, (tuple, list)) else [example]
                raise DataError(
                    f"{source}: example {index} of {part} is ({', '.join(type(value).__name__ for value in values)}), "
                    "and must be an image and the number of its class. Take a data set for classification, choose a "
                    "part with labels (data.options.split), or write data=custom"
                )
            yield example[0], classes[label] if label < len(classes) else str(label)


def _label(example: Any) -> int | None:
    """Return the label of an image; ``None`` if the example is anything else."""
    if not isinstance(example, (tuple, list)) or len(example) != 2 or not isinstance(example[0], Image.Image):
        return None
    try:
        label = operator.index(example[1])
    except TypeError:
        return None
    return None if isinstance(example[1], bool) or label < 0 else label


def _class_names(data: Any) -> tuple[str, ...]:
    """Return the names of a data set's classes by label: those of folders, if they differ; none if there are none."""
    for attribute in ("wnids", "classes", "categories"):
        names = getattr(data, attribute, ())
        if names and all(isinstance(name, str) for name in names) and len({*names}) == len(names):
            return tuple(names)
    return ()
