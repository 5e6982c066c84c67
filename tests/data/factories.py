"""Small folders of images."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

ORANGE = (255, 128, 0)

_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR_100 = _NAMES.split()
"""The fine classes in the order of their labels, which is that of the alphabet."""


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
