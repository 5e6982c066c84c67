"""Glyphs are deterministic, in range, and similar within a class."""

from __future__ import annotations

import torch

from metalearn.data.glyphs import make_glyphs


def test_shape_range_and_seed() -> None:
    images = make_glyphs(classes=70, drawings=5)
    assert images.shape == (70, 5, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert torch.equal(images, make_glyphs(classes=70, drawings=5))
    assert not torch.equal(images, make_glyphs(classes=70, drawings=5, seed=1))
    ink = images.float().mean(dim=(-2, -1)) / 255
    assert 0.02 < ink.min() < ink.max() < 0.6, "every drawing shows strokes on an empty ground"


def test_drawings_of_a_class_are_similar_but_not_equal() -> None:
    images = make_glyphs(classes=40, drawings=6).float().flatten(2)
    centred = torch.nn.functional.normalize(images - images.mean(dim=-1, keepdim=True), dim=-1)
    similarity = torch.einsum("cip,djp->cdij", centred, centred)
    within = similarity.diagonal().permute(2, 0, 1)[:, ~torch.eye(6, dtype=torch.bool)]
    between = similarity[~torch.eye(40, dtype=torch.bool)]
    assert within.mean() > between.mean() + 0.15
    assert within.max() < 0.999


def test_jitter_increases_differences() -> None:
    def spread(jitter: float) -> float:
        return make_glyphs(classes=40, jitter=jitter).float().std(dim=1).mean().item()

    assert spread(0.0) < spread(0.05) < spread(0.15)
