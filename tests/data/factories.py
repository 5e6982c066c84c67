"""Small folders of images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

ORANGE = (255, 128, 0)


def save_image(path: Path, colour: tuple[int, ...] = ORANGE, size: tuple[int, int] = (30, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def make_classes(root: Path, counts: dict[str, int]) -> Path:
    """Make classes of that many images; red tells the class, in sorted order, and green the number of the image."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        for number in range(count):
            save_image(root / name / f"{number:03}.png", (20 * label, 10 * number, 0))
    return root
