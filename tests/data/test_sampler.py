"""Episodes are a pure function of (seed, split, index), with the right classes, drawings and labels."""

from __future__ import annotations

import pytest
import torch

from metalearn.data.sampler import EpisodeSampler, TaskShape, _mix

SHAPE = TaskShape(ways=5, shots=2, queries=3)


def labelled_images(classes: int = 12, drawings: int = 8) -> torch.Tensor:
    """Every drawing shows its class in one pixel and its own number in another."""
    images = torch.zeros(classes, drawings, 1, 1, 2, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(classes)[:, None, None]
    images[..., 0, 1] = torch.arange(drawings)[None, :, None]
    return images


def sampler(*, seed: int = 0, split: str = "train") -> EpisodeSampler:
    return EpisodeSampler(labelled_images(), SHAPE, seed, split)


def test_a_batch_is_the_same_however_it_is_cut() -> None:
    whole = sampler().tasks(6, 6)
    assert torch.equal(whole.query_x, torch.cat([sampler().tasks(6, 2).query_x, sampler().tasks(8, 4).query_x]))
    assert torch.equal(whole.query_x, sampler().batch(1, 6).query_x)


def test_seed_split_and_index_each_change_the_tasks() -> None:
    base = sampler().tasks(0, 4).support_x
    for other in (sampler(seed=1).tasks(0, 4), sampler(split="test").tasks(0, 4), sampler().tasks(4, 4)):
        assert not torch.equal(base, other.support_x)


def test_classes_and_drawings_do_not_repeat_and_labels_follow_classes() -> None:
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


def test_every_class_and_drawing_is_equally_likely() -> None:
    classes, drawings = sampler().draw(0, 6000)
    for counts, n in ((classes[:, 0].bincount(minlength=12), 12), (drawings[:, 3, 0].bincount(minlength=8), 8)):
        expected = 6000 / n
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_squared < 40, f"p < 1e-4 for {n - 1} degrees of freedom: {counts.tolist()}"


def test_the_stream_never_changes() -> None:
    # Pinned: resuming an old run and repeating a published one rely on it.
    classes, drawings = sampler().draw(0, 2)
    assert classes.tolist() == [[6, 3, 8, 7, 5], [3, 1, 8, 11, 5]]
    assert drawings[0, 0].tolist() == [4, 6, 5, 7, 3]


def test_hash_is_splitmix64() -> None:
    def reference(z: int) -> int:
        mask = 2**64 - 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    for z in (0, 1, 12345678901234567, 2**64 - 1, 0x9E3779B97F4A7C15):
        signed = z - 2**64 if z >= 2**63 else z
        assert _mix(torch.tensor(signed)).item() % 2**64 == reference(z)


@pytest.mark.gpu
def test_gpu_draws_the_same_tasks() -> None:
    on_gpu = EpisodeSampler(labelled_images().cuda(), SHAPE, 0, "train").tasks(3, 16)
    assert torch.equal(on_gpu.query_x.cpu(), sampler().tasks(3, 16).query_x)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TaskShape(13, 1, 1), "13 ways, but split 'train' has only 12 classes"),
        (TaskShape(5, 4, 5), "4 shots and 5 queries a class, but split 'train' has only 8 drawings"),
    ],
)
def test_tasks_that_do_not_fit_the_data_are_named(shape: TaskShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(labelled_images(), shape, 0, "train")


def test_images_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[classes, drawings, .*float32 \(12, 8, 1, 1, 2\)"):
        EpisodeSampler(labelled_images().float(), SHAPE, 0, "train")
