"""Sinusoids are Finn's, a pure function of (seed, split, index), and every point lies on its task's curve."""

from __future__ import annotations

import math

import pytest
import torch

from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from metalearn.config.validation import validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.data.sinusoid import SinusoidSampler
from metalearn.training.experiment import build_model, build_samplers


def sampler(*, shots: int = 10, queries: int = 5, seed: int = 0, split: str = "train") -> SinusoidSampler:
    return SinusoidSampler(shots, queries, seed, split)


def test_points_lie_on_the_curve_of_their_task() -> None:
    episodes = sampler().tasks(3, 8)
    assert episodes.support_x.shape == episodes.support_y.shape == (8, 10, 1)
    assert episodes.query_x.shape == episodes.query_y.shape == (8, 5, 1)
    x, y = (
        torch.cat(pair, dim=1)
        for pair in ((episodes.support_x, episodes.query_x), (episodes.support_y, episodes.query_y))
    )
    assert x.dtype == y.dtype == torch.float32
    for task in range(8):
        amplitude, phase = sampler().curve(3 + task)
        for point, value in zip(x[task, :, 0].tolist(), y[task, :, 0].tolist(), strict=True):
            assert value == pytest.approx(amplitude * math.sin(point - phase), rel=1e-6, abs=1e-6)


def test_ranges_equal_finns() -> None:
    curves = [sampler().curve(i) for i in range(2000)]
    x = sampler().tasks(0, 2000).support_x.flatten()
    amplitudes, phases = (torch.tensor(values) for values in zip(*curves, strict=True))
    for values, low, high in ((amplitudes, 0.1, 5.0), (phases, 0.0, math.pi), (x, -5.0, 5.0)):
        assert low <= values.min() <= low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) <= values.max() <= high
        # The mean of n uniform numbers has a standard deviation of (high - low) / sqrt(12 n).
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * len(values))
    assert abs(torch.corrcoef(torch.stack([amplitudes, phases]))[0, 1]) < 0.1


def test_batch_equals_its_parts() -> None:
    whole = sampler().tasks(6, 6)
    assert torch.equal(whole.query_y, torch.cat([sampler().tasks(6, 2).query_y, sampler().tasks(8, 4).query_y]))
    assert torch.equal(whole.query_y, sampler().batch(1, 6).query_y)
    assert torch.equal(whole.support_x, sampler(queries=50).batch(1, 6).support_x), "queries change no support set"


def test_seed_split_and_index_change_the_tasks() -> None:
    base = sampler().tasks(0, 4).support_y
    for other in (sampler(seed=1).tasks(0, 4), sampler(split="test").tasks(0, 4), sampler().tasks(4, 4)):
        assert not torch.equal(base, other.support_y)


def test_stream_is_pinned() -> None:
    # Pinned: resuming an old run and repeating a published one rely on it.
    assert sampler().curve(0) == pytest.approx((0.5090737114195154, 3.039332777391281), rel=1e-12)
    assert sampler().tasks(0, 1).support_x[0, :2, 0].tolist() == pytest.approx([-0.9238119, -1.1664705], rel=1e-7)


@pytest.mark.gpu
def test_gpu_gives_the_same_tasks() -> None:
    on_gpu, on_cpu = SinusoidSampler(10, 5, 0, "train", "cuda").tasks(3, 16), sampler().tasks(3, 16)
    assert torch.equal(on_gpu.support_x.cpu(), on_cpu.support_x)
    torch.testing.assert_close(on_gpu.support_y.cpu(), on_cpu.support_y, rtol=2e-7, atol=2e-7)


def test_empty_set_raises() -> None:
    with pytest.raises(ValueError, match="shots=0; it must be at least 1"):
        sampler(shots=0)
    with pytest.raises(ValueError, match="queries=-1; it must be at least 1"):
        sampler(queries=-1)


def test_sinusoid_experiment_equals_finns() -> None:
    config = to_dataclass(compose("train", ["experiment=sinusoid"]), TrainConfig)
    validate_train_config(config)
    assert (config.task.shots, config.task.meta_batch) == (10, 25)
    assert (config.inner.lr, config.inner.steps, config.outer.lr) == (0.01, 1, 1e-3)
    train, _, test = build_samplers(config, torch.device("cpu"))
    model = build_model(config, train.example_shape, 1)
    assert [tuple(p.shape) for p in model.parameters()] == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
    assert model(train.tasks(0, 2).support_x[0]).shape == (10, 1)
    assert not torch.equal(train.tasks(0, 2).support_x, test.tasks(0, 2).support_x)


def test_image_model_raises() -> None:
    with pytest.raises(ConfigError, match="model=conv4: data=sinusoid has numbers for inputs, and no images"):
        validate_train_config(to_dataclass(compose("train", ["data=sinusoid"]), TrainConfig))
