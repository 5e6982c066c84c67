"""No pass changes a module, and its function can be pickled and copied."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import prune

from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from metalearn.core.functional import ModuleForward
from metalearn.metagrad import ENGINES
from metalearn.models import Conv4
from tests.core.networks import TASKS, Net, X, chain


def two_names() -> nn.Module:
    module = Net()
    module.b = module.a
    return module


def tied_weight() -> nn.Module:
    module = Net()
    module.b.weight = module.a.weight
    return module


class TiedOfTwoNames(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c = self.b = self.a
        self.d = nn.Linear(5, 5)
        self.d.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.d(x) + self.c(x))


class SharedBuffer(Net):
    """Two names of a buffer that forward writes to and reads, buffers that it creates, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.a.register_buffer("calls", self.calls)
        self.register_buffer("made", None)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls: Tensor
        self.calls += 1
        self.calls = self.calls * 2
        self.made = torch.ones(5)
        self.register_buffer("late", torch.ones(5))
        return super().forward(x * self.made * self.frozen) + self.a.get_buffer("calls")


class Switches(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.train(not self.training)
        return super().forward(x)


class Fails(Net):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.eval()
        raise ArithmeticError(f"{logits.shape} is not to be had")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def quietly(normalise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm is deprecated
        return chain(normalise(nn.Linear(5, 5)))


def pruned() -> nn.Module:
    module = chain(nn.Linear(5, 5))
    prune.l1_unstructured(module[1], "weight", amount=0.5)  # type: ignore[index]
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "two names": two_names,
    "tied weight": tied_weight,
    "tied weight of two names": TiedOfTwoNames,
    "one layer twice": lambda: (lambda layer: chain(layer, nn.Tanh(), layer))(nn.Linear(5, 5)),
    "shared buffer": SharedBuffer,
    "switches its mode": Switches,
    "parametrized weight_norm": lambda: chain(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))),
    "parametrized spectral_norm": lambda: chain(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))),
    "orthogonal": lambda: chain(nn.utils.parametrizations.orthogonal(nn.Linear(5, 5))),
    "weight_norm": lambda: quietly(nn.utils.weight_norm),
    "spectral_norm": lambda: quietly(nn.utils.spectral_norm),
    "pruned": pruned,
    "lstm": Recurrent,
    "batch norm in eval": lambda: chain(nn.BatchNorm1d(5)).eval(),
    "batch norm without statistics": lambda: chain(nn.BatchNorm1d(5, track_running_stats=False)),
    "converted batch norm": lambda: torch.func.replace_all_batch_norm_modules_(chain(nn.BatchNorm1d(5))),
    "instance norm, dropout": lambda: chain(nn.LayerNorm(5), nn.Dropout(0.1)),
    "transformer": lambda: chain(nn.TransformerEncoderLayer(5, 1, 8)),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(Net()),
    "compiled": lambda: cast(nn.Module, torch.compile(Net(), backend="eager")),
}


def state_of(module: nn.Module) -> list[tuple[str, object, Any]]:
    """Return every tensor of a module, its values, and the modules' flags and attributes."""
    found: list[tuple[str, object, Any]] = []
    for name, m in module.named_modules():
        found.append((f"{name}.training", None, m.training))
        for kind, tensors in (("", m._parameters), ("", m._buffers), ("attribute ", vars(m))):
            for own, tensor in tensors.items():
                for i, t in enumerate(tensor if isinstance(tensor, list) else [tensor]):
                    if isinstance(t, Tensor):
                        found.append((f"{kind}{name}.{own}.{i}", t, t.detach().clone()))
    return found


def check_unchanged(module: nn.Module, before: list[tuple[str, object, Any]]) -> None:
    after = state_of(module)
    assert [name for name, *_ in after] == [name for name, *_ in before]
    for (name, same, value), (_, other, now) in zip(before, after, strict=True):
        assert other is same, name
        assert torch.equal(value, now) if isinstance(value, Tensor) else value == now, name


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODULES)
def test_forward_does_not_change_the_module(name: str) -> None:
    module = MODULES[name]()
    forward, theta = functionalize(module)
    assert theta.keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    before = state_of(module)
    forward({n: 2 * p for n, p in theta.items()}, X)
    check_unchanged(module, before)
    try:  # what cannot be batched over tasks must leave no less
        meta_gradient(forward, theta, TASKS, InnerLoop(lr=0.1, steps=1))
    except (RuntimeError, ValueError):
        assert name in ("lstm", "spectral_norm", "parametrized spectral_norm", "orthogonal")
    check_unchanged(module, before)
    can_be_copied = name not in ("weight_norm", "pruned")  # which torch itself cannot, from the beginning
    again, same = functionalize(copy.deepcopy(module) if can_be_copied else module)
    assert {n: p.tolist() for n, p in same.items()} == {n: p.tolist() for n, p in theta.items()}
    torch.manual_seed(0)
    expected = again(theta, X)
    torch.manual_seed(0)
    assert torch.equal(module(X), expected)
    module.load_state_dict(module.state_dict())


def test_failed_forward_does_not_change_the_module() -> None:
    module = Fails()
    module.b = module.a
    forward, theta = functionalize(module)
    before = state_of(module)
    for run in (
        lambda: forward(theta, X),
        lambda: meta_gradient(forward, theta, TASKS, InnerLoop(lr=0.1, steps=1)),
        lambda: torch.func.grad(lambda p: forward(p, X).sum())(theta),
    ):
        with pytest.raises(ArithmeticError, match="not to be had"):
            run()
        check_unchanged(module, before)


@pytest.mark.parametrize("name", ["two names", "tied weight of two names", "one layer twice"])
def test_gradient_of_shared_layers_is_the_sum_over_places(name: str) -> None:
    module = MODULES[name]().double()
    forward, theta = functionalize(module)
    x, at = X.double(), {n: p.clone().requires_grad_() for n, p in theta.items()}
    module(x).square().sum().backward()
    forward(at, x).square().sum().backward()
    for n, p in module.named_parameters():
        torch.testing.assert_close(at[n].grad, p.grad)


def test_tied_tensor_given_twice_raises() -> None:
    forward, theta = functionalize(tied_weight())
    with pytest.raises(ValueError, match=r"two of .*b\.weight that are one tensor of Net; give it once"):
        forward({**theta, "b.weight": theta["a.weight"]}, X)


def test_in_place_write_to_frozen_parameter_raises() -> None:
    class Decays(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.a.weight.mul_(0.9)
            return super().forward(x)

    module = Decays()
    module.a.requires_grad_(False)
    forward, theta = functionalize(module)
    with pytest.raises(ValueError, match="Decays changes a frozen parameter in place"):
        forward(theta, X)


def test_attributes_set_in_forward_are_kept() -> None:
    class Penalised(Net):
        def __init__(self) -> None:
            super().__init__()
            self.penalty = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.penalty = self.a.weight.square().sum()
            return super().forward(x)

    module = Penalised()
    forward, theta = functionalize(module)
    forward({**theta, "a.weight": torch.ones(5, 5)}, X)
    assert module.penalty == 25


class Caches(nn.Module):
    """Keeps what it computes of its weight, as a user may who calls it with one weight only."""

    def __init__(self, *, batchable: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))
        self.cache: Tensor | None = None
        self.both: tuple[str, Tensor] | None = None
        self.batchable = batchable

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None or self.both is None:
            self.cache = self.weight.exp()
            self.both = "a tensor in a tuple", self.weight.exp()
        assert self.batchable or x.sum() < 1e9  # vmap does not know it
        return x @ (self.cache + self.both[1]) / 2


def test_pass_does_not_find_what_an_earlier_one_has_assigned() -> None:
    module = Caches()
    forward, theta = functionalize(module)
    x = torch.ones(2, 3, dtype=torch.float64)
    for scale in (1.0, 2.0):
        weight = scale * theta["weight"]
        assert torch.equal(forward({"weight": weight}, x), x @ weight.exp())
        assert module.cache is not None, "a loss may read it"
        assert torch.equal(module.cache, weight.exp())
    weight = 3.0 * theta["weight"]
    whole, of_whole = functionalize(nn.Sequential(module))
    assert torch.equal(whole(dict.fromkeys(of_whole, weight), x), x @ weight.exp()), "as a part of another module"
    module.cache, module.both = kept = torch.zeros(3, 3, dtype=torch.float64), ("", torch.zeros(3, 3).double())
    forward(theta, x)
    assert (module.cache, module.both) == kept, "the user's own"


@pytest.mark.parametrize("batchable", [True, False])
def test_tasks_do_not_find_what_another_has_assigned(batchable: bool) -> None:
    forward, theta = functionalize(Caches(batchable=batchable))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    tasks = Episodes(x[0], x[0], x[1], x[1])
    want = meta_gradient(
        lambda params, x: x @ params["weight"].exp(), theta, tasks, InnerLoop(lr=0.1, steps=2), loss=mse_loss
    )
    for engine in ENGINES:
        found = meta_gradient(forward, theta, tasks, InnerLoop(lr=0.1, steps=2, engine=engine), loss=mse_loss)
        torch.testing.assert_close(found.grads, want.grads)


@pytest.mark.parametrize("send", [lambda f: pickle.loads(pickle.dumps(f)), copy.deepcopy])
def test_module_forward_can_be_pickled_and_copied(send: Callable[[Any], Any]) -> None:
    module = Conv4(5, width=4)
    forward, theta = functionalize(module)
    assert isinstance(forward, ModuleForward)
    sent, x = send(forward), torch.rand(3, 1, 28, 28)
    assert torch.equal(sent(theta, x), forward(theta, x))
    assert sent.module is not module
    assert sent.batched_forward is not None
    assert ModuleForward(nn.Linear(5, 3)).batched_forward is None


def test_former_names_of_batched_forward_work_and_warn() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

        def is_plain(self) -> bool:
            return True

        def forward_of_tasks(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
            return -x * params["scale"].unsqueeze(1)

    with pytest.warns(FutureWarning) as warned:
        forward, theta = functionalize(Scaled())
    assert [str(w.message) for w in warned] == [
        "the method forward_of_tasks of Scaled is called batched_forward now",
        "the method is_plain of Scaled is called supports_batched_forward now",
    ]
    assert isinstance(forward, ModuleForward)
    assert forward.batched_forward is not None
    x = torch.ones(2, 4, 1, 3, 3)
    assert torch.equal(cast(Tensor, forward.batched_forward({"scale": theta["scale"].expand(2, 1, 1, 1)}, x)), -x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.tanh, "this is builtin_function_or_method, and must be an nn.Module"),
        (nn.Linear, "this is the class Linear, and must be an nn.Module"),
        (None, "this is NoneType, and must be"),
    ],
)
def test_what_is_no_module_raises(module: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        functionalize(module)
