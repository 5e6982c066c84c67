"""A user's own code, right and wrong: copied into an empty folder, and named by a configuration."""

# mypy: ignore-errors

import random
from dataclasses import dataclass, replace

import torch
from torch import nn

from metalearn import Algorithm, Episodes
from metalearn.inner import state_key


class Net(nn.Module):
    def __init__(self, ways, example_shape, width=8):
        super().__init__()
        self.body, self.head = nn.Linear(example_shape.numel(), width), nn.Linear(width, ways)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.flatten(1))))


class Running(nn.Module):
    """BatchNorm with running statistics."""

    def __init__(self, ways, example_shape):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(example_shape.numel()), nn.Linear(example_shape.numel(), ways)

    def forward(self, x):
        return self.head(self.norm(x.flatten(1)))


def images(size, sparse=False, dtype=torch.uint8, ways=None):
    def split(seed, classes):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(256, (classes, 6, 1, size, size), generator=generator).to(dtype)
        return [each[: 6 - i % 2] for i, each in enumerate(x)] if sparse else x

    return {"train": split(0, 9), "validation": split(1, 5), "test": split(2, 5)}


@dataclass
class Points:
    """Regression of two numbers on three."""

    shots: int
    queries: int
    split: str
    noise: float = 0.0

    def tasks(self, first, count):
        x = torch.stack(
            [
                torch.randn(self.shots + self.queries, 3, generator=torch.Generator().manual_seed(first + i))
                for i in range(count)
            ]
        )
        y = x[..., :2] * (1 + self.noise)
        return Episodes(x[:, : self.shots], y[:, : self.shots], x[:, self.shots :], y[:, self.shots :])


@dataclass(frozen=True)
class AdaGrad:
    eps: float = 1e-3

    def init(self, fast):
        return {state_key("sum", name): torch.zeros_like(w) for name, w in fast.items()}

    def update(self, k, grads, state):
        state = {state_key("sum", name): state[state_key("sum", name)] + g * g for name, g in grads.items()}
        return {name: g / (state[state_key("sum", name)] + self.eps).sqrt() for name, g in grads.items()}, state


def anil_lslr(inner, parts, learned="layer"):
    return Algorithm("anil_lslr", replace(inner, adapted_params=frozenset(parts.head), learned_lr=learned))


class Dropping(Net):
    def __init__(self, ways, example_shape):
        super().__init__(ways, example_shape)
        self.fixed = torch.rand(self.body.in_features)  # neither a parameter nor a buffer

    def forward(self, x):
        return super().forward(nn.functional.dropout(x.flatten(1) * self.fixed, 0.2))


class Noisy(Dropping):
    def forward(self, x):
        return super().forward(x * (1 + 0.1 * random.random()))


class OnceDifferentiable(Net):
    def forward(self, x):
        bags = torch.zeros(len(x), 1, dtype=torch.int64)
        return super().forward(x) + nn.functional.embedding_bag(bags, self.head.weight).mean()


def drawn(size):
    """Examples from the global generator, in every split."""
    return {split: torch.rand(7, 6, 1, size, size) for split in ("train", "validation", "test")}


def anil_drawing(inner, parts):
    torch.manual_seed(5)
    return anil_lslr(inner, parts)


@dataclass(frozen=True)
class DrawingAdaGrad(AdaGrad):
    def __post_init__(self):
        torch.manual_seed(5)


class Wide(Net):
    def forward(self, x):
        return super().forward(x)[:, :3]


class Deep(Net):
    def forward(self, x):
        return self.head(x)


class Normalised(Net):
    def __init__(self, ways, example_shape, width=8):
        super().__init__(ways, example_shape, width)
        self.norm = nn.BatchNorm1d(width)


def text(*arguments, **more):
    return "nothing"


def explode():
    raise AssertionError("these data take minutes to read")


def given(train):
    """Take the training split as it is; the others are sound."""
    return {"train": train, "validation": torch.rand(5, 6, 2), "test": torch.rand(5, 6, 2)}


def nan(which=None):
    x = torch.rand(5, 6, 2)
    x[3, 1] = torch.nan
    return given([*x] if which == "list" else x)


def shapes():
    return given([torch.rand(6, 2), torch.rand(6, 2), torch.rand(6, 3)])


def kinds():
    return given([torch.rand(6, 2), torch.zeros(6, 2, dtype=torch.uint8)])


def wider():
    return given(torch.rand(5, 6, 3))


def few(which=None):
    return given([*torch.rand(4, 6, 2), torch.rand(3, 2)] if which == "list" else torch.rand(5, 3, 2))


@dataclass
class Seeding(Points):
    """The same tasks as of ``Points``, and a global generator that is seeded."""

    def tasks(self, first, count):
        torch.manual_seed(first)
        return super().tasks(first, count)


class Broken(Points):
    def tasks(self, first, count):
        episodes = super().tasks(first, count)
        episodes.query_x[0, 0] = torch.inf
        return episodes


class Unlike(Points):
    def tasks(self, first, count):
        e = super().tasks(first, count)
        return Episodes(e.support_x, e.support_y, e.query_x[..., :2], e.query_y)


class Restless(Points):
    def tasks(self, first, count):
        x = torch.rand(count, 5, 3)
        y = torch.arange(5).repeat(count, 1)
        return Episodes(x, y, x, y)


class Labelled(Points):
    def tasks(self, first, count):
        x, y = torch.ones(count, 5, 3), torch.arange(5).repeat(count, 1) + 1
        return Episodes(x, y, x, y)


class Short(Labelled):
    def tasks(self, first, count):
        return super().tasks(first, 1)
