"""Episodes are a pure function of (seed, split, index), with the right classes, drawings and labels."""

from __future__ import annotations

import pytest
import torch

from metalearn.data.sampler import EpisodeSampler, TaskShape

SHAPE = TaskShape(ways=5, shots=2, queries=3)


def labelled_images(classes: int = 12, drawings: int = 8) -> torch.Tensor:
    """Make images that show their class in one pixel and their number in another."""
    images = torch.zeros(classes, drawings, 1, 1, 2, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(classes)[:, None, None]
    images[..., 0, 1] = torch.arange(drawings)[None, :, None]
    return images


def sampler(*, seed: int = 0, split: str = "train") -> EpisodeSampler:
    return EpisodeSampler(labelled_images(), SHAPE, seed, split)


def test_batch_equals_its_parts() -> None:
    whole = sampler().tasks(6, 6)
    assert torch.equal(whole.query_x, torch.cat([sampler().tasks(6, 2).query_x, sampler().tasks(8, 4).query_x]))
    assert torch.equal(whole.query_x, sampler().batch(1, 6).query_x)


def test_seed_split_and_index_change_the_tasks() -> None:
    base = sampler().tasks(0, 4).support_x
    for other in (sampler(seed=1).tasks(0, 4), sampler(split="test").tasks(0, 4), sampler().tasks(4, 4)):
        assert not torch.equal(base, other.support_x)


def test_classes_and_drawings_are_distinct_in_a_task() -> None:
    episodes = sampler().tasks(0, 200)
    x = (torch.cat([episodes.support_x, episodes.query_x], dim=1) * 255).round().long()
    y = torch.cat([episodes.support_y, episodes.query_y], dim=1)
    for task_x, task_y in zip(x, y, strict=True):
        classes = {int(label): set(task_x[task_y == label, 0, 0, 0].tolist()) for label in range(5)}
        assert all(len(of_label) == 1 for of_label in classes.values()), "one class a label"
        assert len(set.union(*classes.values())) == 5, "another class for every label"
        shown = {tuple(pixels) for pixels in task_x[:, 0, 0].tolist()}
        assert len(shown) == 5 * (2 + 3), "support and query share no drawing"
    assert episodes.support_y.shape == (200, 10)
    assert episodes.query_y[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3


def test_classes_and_drawings_are_uniform() -> None:
    classes, drawings = sampler().draw(0, 6000)
    for counts, n in ((classes[:, 0].bincount(minlength=12), 12), (drawings[:, 3, 0].bincount(minlength=8), 8)):
        expected = 6000 / n
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_squared < 40, f"p < 1e-4 for {n - 1} degrees of freedom: {counts.tolist()}"


def test_stream_is_pinned() -> None:
    # Pinned: resuming an old run and repeating a published one rely on it.
    classes, drawings = sampler().draw(0, 2)
    assert classes.tolist() == [[6, 3, 8, 7, 5], [3, 1, 8, 11, 5]]
    assert drawings[0, 0].tolist() == [4, 6, 5, 7, 3]


@pytest.mark.gpu
def test_gpu_gives_the_same_tasks() -> None:
    on_gpu = EpisodeSampler(labelled_images().cuda(), SHAPE, 0, "train").tasks(3, 16)
    assert torch.equal(on_gpu.query_x.cpu(), sampler().tasks(3, 16).query_x)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TaskShape(13, 1, 1), "13 ways, but split 'train' has only 12 classes"),
        (TaskShape(5, 4, 5), "4 shots and 5 queries a class, but split 'train' has only 8 drawings"),
    ],
)
def test_tasks_larger_than_the_data_raise(shape: TaskShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(labelled_images(), shape, 0, "train")


def test_images_of_other_shape_or_dtype_raise() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[classes, drawings, .*float32 \(12, 8, 1, 1, 2\)"):
        EpisodeSampler(labelled_images().float(), SHAPE, 0, "train")


def test_equal_counts_give_the_same_tasks() -> None:
    images = torch.arange(12 * 8, dtype=torch.uint8).view(12, 8, 1, 1, 1)
    shape = TaskShape(5, 2, 3)
    even = EpisodeSampler(images, shape, 0, "train").tasks(0, 20)
    flat = EpisodeSampler(images.flatten(0, 1), shape, 0, "train", [8] * 12).tasks(0, 20)
    assert torch.equal(even.support_x, flat.support_x)
    assert torch.equal(even.query_x, flat.query_x)


def test_classes_of_different_sizes_are_sampled_uniformly() -> None:
    counts = [3, 10, 4, 7]
    images = torch.cat([torch.stack([torch.full((n,), c), torch.arange(n)], dim=1) for c, n in enumerate(counts)])
    sampler = EpisodeSampler(images.to(torch.uint8).view(-1, 1, 1, 2), TaskShape(3, 1, 2), 0, "train", counts)
    episodes = sampler.tasks(0, 4000)
    x = torch.cat([episodes.support_x, episodes.query_x], dim=1).mul(255).round().long()[:, :, 0, 0]
    y = torch.cat([episodes.support_y, episodes.query_y], dim=1)
    for task_x, task_y in zip(x[:200], y[:200], strict=True):
        assert len({tuple(pixels) for pixels in task_x.tolist()}) == 9, "no image twice in a task"
        assert all(len(set(task_x[task_y == label, 0].tolist())) == 1 for label in range(3)), "one class a label"
    for label, n in enumerate(counts):
        seen = x[x[:, :, 0] == label][:, 1].bincount(minlength=n)
        expected = seen.sum() / n
        assert len(seen) == n
        assert ((seen - expected) ** 2 / expected).sum() < 35, f"every image as likely: {seen.tolist()}"
    assert x[:, 0, 0].bincount().tolist() == pytest.approx([1000] * 4, rel=0.12), (
        "every class as likely, whatever its size"
    )


def test_counts_that_do_not_match_raise() -> None:
    images = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="counts add up to 9, but there are 10 images in split 'test'"):
        EpisodeSampler(images, TaskShape(2, 1, 1), 0, "test", [4, 5])
    with pytest.raises(
        ValueError, match="1 shots and 2 queries a class, but split 'test' has only 2 images in class 1"
    ):
        EpisodeSampler(images, TaskShape(2, 1, 2), 0, "test", [8, 2])
    with pytest.raises(
        ValueError, match=r"uint8 \[total, channels, height, width\], got torch.uint8 \(1, 10, 1, 2, 2\)"
    ):
        EpisodeSampler(images[None], TaskShape(2, 1, 1), 0, "test", [10])
