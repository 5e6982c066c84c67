"""Named algorithms against independent computations, and their configurations."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from metalearn import InnerLoop, Params, functionalize, meta_gradient
from metalearn.algorithms import ALGORITHMS, anil, boil, cavia, imaml, maml_pp, meta_sgd, multi_step_weights, protonet
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.options import PLAIN_ALGORITHMS
from metalearn.config.schema import TrainConfig
from metalearn.core.module_parts import module_parts
from metalearn.core.params import relative_error
from metalearn.inner import apply_update, init_state
from metalearn.inner.batch_norm_statistics import (
    is_norm_statistic,
    record_statistics,
    statistics_at,
    statistics_to_params,
    with_fixed_statistics,
)
from metalearn.models import MLP, ContextConv4, Conv4
from tests.factories import image_episodes

INNER = InnerLoop(0.1, 3)


def conv4() -> Conv4:
    return Conv4(3, width=4).double()


def test_module_parts_finds_head_norms_and_context() -> None:
    parts = module_parts(conv4())
    assert parts.head == ("head.weight", "head.bias")
    assert parts.norm_params == {f"features.{i}.1.{name}" for i in range(4) for name in ("weight", "bias")}
    assert parts.body == parts.all_params - set(parts.head)
    assert module_parts(ContextConv4(3, width=4, context=5)).context_params == {"context"}
    frozen = conv4()
    frozen.get_parameter("features.0.1.weight").requires_grad_(False)
    assert "features.0.1.weight" not in module_parts(frozen).norm_params
    assert module_parts(nn.Linear(3, 2)).head == ("weight", "bias")
    out_of_order = nn.ModuleDict({"head": nn.Linear(8, 3), "body": nn.Linear(4, 8)})
    assert module_parts(out_of_order).head == ("head.weight", "head.bias")
    assert module_parts(out_of_order, head="body").head == ("body.weight", "body.bias")
    with pytest.raises(ValueError, match=r"head='tail' is no nn\.Linear of the module; it has head, body"):
        module_parts(out_of_order, head="tail")


def test_anil_adapts_head_and_boil_adapts_body() -> None:
    module, episodes = conv4(), image_episodes()
    forward, theta = functionalize(module)
    for algorithm in (anil(INNER, module_parts(module)), boil(INNER, module_parts(module))):
        state = init_state(forward, theta, episodes.support_x, episodes.support_y, algorithm.inner)
        own = algorithm.inner.adapted_params
        assert own is not None
        after = apply_update(state, {name: torch.ones_like(state[name]) for name in own}, algorithm.inner, 0)
        moved = {name for name in theta if not torch.equal(after[name], state[name])}
        assert moved == {name for name in theta if name.startswith("head") == (algorithm.name == "anil")}


def test_meta_sgd_equals_maml_at_initial_lrs() -> None:
    module, episodes = conv4(), image_episodes()
    forward, params = functionalize(module)
    algorithm = meta_sgd(INNER, module_parts(module))
    theta = algorithm.init(params)
    assert {name: p.shape for name, p in theta.items() if "::" in name} == {
        f"lr::{name}": p.shape for name, p in params.items()
    }
    got, expected = algorithm.meta_gradient(forward, theta, episodes), meta_gradient(forward, params, episodes, INNER)
    assert relative_error({name: got.grads[name] for name in params}, expected.grads) < 1e-12


def test_multi_step_weights_equal_the_authors_code() -> None:
    # Their code: each epoch takes 1/K/epochs from every step but the last, down to 0.03/K, and gives it to the last.
    steps, epochs = 5, 10
    for epoch in range(epochs + 1):
        early = [max(1 / steps - epoch / steps / epochs, 0.03 / steps)] * (steps - 1)
        last = min(1 / steps + epoch * (steps - 1) / steps / epochs, 1 - (steps - 1) * 0.03 / steps)
        assert multi_step_weights(steps, epoch / epochs) == pytest.approx((0.0, *early, last))


def test_maml_pp_sets_each_improvement() -> None:
    module = conv4()
    parts = module_parts(module)
    _, params = functionalize(module)
    whole = maml_pp(INNER, parts, multi_step_share=0.2, first_order_share=0.5)
    theta = whole.init(params)
    assert all(theta[name].shape == (4, 4) for name in parts.norm_params), "K + 1 rows of 4 channels"
    assert {name for name in theta if "::" in name} == {f"lr::{name}" for name in parts.all_params - parts.norm_params}
    assert theta["lr::head.weight"].tolist() == pytest.approx([0.1] * 3)
    orders = [whole.inner_at(progress).second_order for progress in (0.0, 0.49, 0.5, 1.0)]
    assert orders == [False, False, True, True]
    assert whole.inner_at(0.0).query_weights == pytest.approx((0, 1 / 3, 1 / 3, 1 / 3))
    assert whole.inner_at(0.2).query_weights is None
    none = dict.fromkeys(("learned_lr", "per_step_affine", "per_step_statistics"), False)
    bare = maml_pp(INNER, parts, multi_step_share=0, first_order_share=0, **none)
    assert bare.inner == INNER
    assert not bare.is_annealed
    assert not bare.tracks_norm_statistics
    assert whole.eval_inner(5).query_weights is None


def test_protonet_equals_class_mean_distances() -> None:
    module, episodes = conv4(), image_episodes(shots=2)
    forward, theta = functionalize(module)
    got = protonet(InnerLoop(0.1, 0), module_parts(module)).meta_gradient(forward, theta, episodes)
    losses = []
    for t in range(episodes.tasks):
        support, query = (module.features(x[t]).mean((-2, -1)) for x in (episodes.support_x, episodes.query_x))
        means = torch.stack([support[episodes.support_y[t] == n].mean(0) for n in range(3)])
        losses.append(cross_entropy(-(query.unsqueeze(1) - means).square().sum(-1), episodes.query_y[t]))
    own = dict(module.named_parameters())
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(own.values()), materialize_grads=True)
    assert relative_error(got.grads, dict(zip(own, grads, strict=True))) < 1e-9
    assert not got.grads["head.weight"].any(), "prototypes take the head's place"


def test_recorded_statistics_equal_moments_of_layer_inputs() -> None:
    module, episodes = MLP(784, 3, hidden=(6, 5)).double(), image_episodes()
    forward, theta = functionalize(module)
    fast = {name: p.expand(3, *p.shape) for name, p in theta.items()}
    found = record_statistics(forward, fast, episodes.query_x)
    seen: list[torch.Tensor] = []
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    for x in episodes.query_x:
        module(x)
    for i, moments in enumerate(found):
        inputs = seen[i::2]
        torch.testing.assert_close(moments.mean, torch.stack([x.mean(0) for x in inputs]).mean(0))
        torch.testing.assert_close(moments.var, torch.stack([x.var(0, correction=0) for x in inputs]).mean(0))
    entries = statistics_to_params([found, found])
    assert all(map(is_norm_statistic, entries))
    kept = statistics_at(entries, 7)
    assert kept is not None
    torch.testing.assert_close(kept[1].var, found[1].var)


def test_fixed_statistics_make_prediction_nontransductive() -> None:
    module, episodes = conv4(), image_episodes(tasks=1)
    forward, theta = functionalize(module)
    statistics = record_statistics(forward, {name: p[None] for name, p in theta.items()}, episodes.support_x)
    alone = with_fixed_statistics(forward, statistics)
    x = episodes.query_x[0]
    torch.testing.assert_close(alone(theta, x)[:1], alone(theta, x[:1]))
    for layer, moments in zip([m for m in module.modules() if isinstance(m, nn.BatchNorm2d)], statistics, strict=True):
        layer.register_buffer("running_mean", moments.mean)
        layer.register_buffer("running_var", moments.var)
        layer.track_running_stats = True
    module.eval()  # torch's own way
    torch.testing.assert_close(alone(theta, x), module(x))


def test_algorithm_raises_when_model_lacks_a_part() -> None:
    headless = module_parts(nn.Sequential(nn.Conv2d(1, 3, 3)))
    for algorithm, parts, message in (
        *((f, headless, r"has no trainable nn\.Linear to be its head") for f in (anil, boil, protonet)),
        (boil, module_parts(nn.Linear(3, 2)), "no body to adapt"),
        (cavia, module_parts(conv4()), "no parameter called 'context'"),
        (protonet, module_parts(nn.Linear(3, 2, bias=False)), "needs a weight and a bias"),
    ):
        with pytest.raises(ValueError, match=message):
            algorithm(INNER, parts)


def test_imaml_sets_proximal_weight() -> None:
    algorithm = imaml(INNER, module_parts(conv4()), proximal_weight=3.0)
    assert algorithm.inner.proximal_weight == 3.0
    assert algorithm.eval_inner(2).proximal_weight == 3.0, "test tasks are adapted like training tasks"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_configuration_has_the_defaults_of_the_algorithm(name: str) -> None:
    config = to_dataclass(compose("train", [f"algorithm={name}"]), TrainConfig).algorithm
    assert config.name == name
    given = {key: value for key, value in vars(config).items() if key not in ("name", "backend")}
    signature = inspect.signature(ALGORITHMS[name]).parameters
    assert given == {key: p.default for key, p in signature.items() if key not in ("inner", "parts", "strength")}
    assert (name in PLAIN_ALGORITHMS) == (not given)
    assert "arXiv" in str(ALGORITHMS[name].__doc__)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_does_not_depend_on_task_chunk(name: str) -> None:
    module = ContextConv4(3, width=4, context=3).double() if name == "cavia" else conv4()
    forward, params = functionalize(module)
    inner = InnerLoop(0.05, 2, engine="adjoint")
    episodes, grads = image_episodes(), list[Params]()
    for chunk in (None, 2):
        algorithm = ALGORITHMS[name](dataclasses.replace(inner, task_chunk=chunk), module_parts(module))
        grads.append(algorithm.meta_gradient(forward, algorithm.init(params), episodes, progress=0.0).grads)
    assert relative_error(grads[1], grads[0]) < 1e-9


def test_former_methods_and_fields_work_and_warn() -> None:
    algorithm = maml_pp(INNER, module_parts(conv4()))
    for old, new, argument in (("at", "inner_at", 0.5), ("testing", "eval_inner", 2)):
        with pytest.warns(FutureWarning, match=f"Algorithm.{old} is called {new} now"):
            assert getattr(algorithm, old)(argument) == getattr(algorithm, new)(argument)
    for old, new in (("heaviest", "peak_memory_inner"), ("anneals", "is_annealed"), ("figures", "diagnostics")):
        with pytest.warns(FutureWarning, match=f"Algorithm.{old} is called {new} now"):
            assert getattr(algorithm, old) == getattr(algorithm, new)
    with pytest.warns(FutureWarning, match="is called tracks_norm_statistics= now"):
        assert dataclasses.replace(algorithm, keeps_statistics=False).tracks_norm_statistics is False  # type: ignore[call-arg]


def test_imaml_takes_the_former_name_of_its_weight() -> None:
    with pytest.warns(FutureWarning, match="proximal_weight"):
        algorithm = imaml(INNER, module_parts(conv4()), strength=3.0)
    assert algorithm.inner.proximal_weight == 3.0
