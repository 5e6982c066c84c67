"""learn2learn's MAML and Meta-SGD, used as in its own examples: a loop over tasks, on clones of modules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from learn2learn.algorithms import MAML, MetaSGD
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop, adapted_param_names, lr_key
from metalearn.metagrad.baselines.common import (
    SupportedSettings,
    TaskResult,
    UnsupportedSettingError,
    average_over_tasks,
    check_supported,
    module_with_params,
)

SUPPORTED: SupportedSettings = {"learned_lr": ("parameter",), "adapted_params": None}


def meta_gradient(
    module: nn.Module, episodes: Episodes, inner: InnerLoop, *, loss: Loss = cross_entropy, params: Params | None = None
) -> MetaGradient:
    """Compute ``metalearn.meta_gradient`` with plain steps, as described by ``common.Baseline``.

    Step sizes may be learned for every entry (Meta-SGD), and ``inner.adapted_params`` may name whole submodules: then
    these alone are wrapped, as in its ANIL example. The body is recomputed in every step, separately for support and
    query sets; the example does both at once, before the steps.

    Reference: Arnold et al. 2020, arXiv 2008.12284; its ``examples/vision/maml_omniglot.py`` and
    ``examples/vision/anil_fc100.py``; Li et al. 2017 (Meta-SGD), arXiv 1707.09835.
    """
    check_supported("learn2learn", inner, SUPPORTED)
    module, theta = module_with_params(module, params, inner)
    parts = _covering_submodules(module, adapted_param_names(theta, inner))
    names = [f"{prefix}.{name}".lstrip(".") for prefix, part in parts.items() for name, _ in part.named_parameters()]
    algorithm = _algorithm(parts[""] if "" in parts else nn.ModuleList(parts.values()), theta, names, inner)
    buffers = {name: b.clone() for name, b in module.named_buffers()}

    def one_task(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> TaskResult:
        _restore_buffers(module, buffers)  # clones share them
        learner, support_losses = algorithm.clone(), []
        for _ in range(inner.steps):
            support_loss = loss(_predict(module, learner, names, parts, support_x), support_y)
            support_losses.append(support_loss.detach())
            learner.adapt(support_loss)
        prediction = _predict(module, learner, names, parts, query_x)
        return TaskResult(loss(prediction, query_y), prediction, support_losses, theta)

    try:
        with warnings.catch_warnings():  # once for every clone of a recurrent layer
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
            return average_over_tasks(one_task, theta, episodes)
    finally:
        _restore_buffers(module, buffers)


def _algorithm(wrapped: nn.Module, theta: Params, names: list[str], inner: InnerLoop) -> MAML | MetaSGD:
    """Return the algorithm to clone for every task; ``names`` are those of the wrapped parameters in theta."""
    if inner.learned_lr is None:
        return MAML(wrapped, lr=inner.lr, first_order=not inner.second_order, allow_nograd=True)
    if not theta.keys() >= set(names) or len(list(wrapped.named_parameters(remove_duplicate=False))) > len(names):
        # It would stop at a frozen one, and leave one place of a shared one unchanged.
        raise UnsupportedSettingError(
            "learn2learn", "learned_lr where parameters are frozen or shared", "its MetaSGD takes each once, and all"
        )
    return MetaSGD(wrapped, first_order=not inner.second_order, lrs=[theta[lr_key(name)] for name in names])


def _covering_submodules(module: nn.Module, adapted: list[str]) -> dict[str, nn.Module]:
    """Return the largest submodules whose trainable parameters together are the adapted ones, by name."""
    remaining, parts = set(adapted), {}
    for prefix, part in module.named_modules():  # the module itself first, under the name ""
        own = {f"{prefix}.{name}".lstrip(".") for name, p in part.named_parameters() if p.requires_grad}
        if own and own <= remaining:
            parts[prefix] = part
            remaining -= own
    if remaining:
        raise UnsupportedSettingError(
            "learn2learn",
            f"adapted_params={{{', '.join(map(repr, sorted(adapted)))}}}",
            f"it adapts whole submodules, and {', '.join(sorted(remaining))} is part of one",
        )
    return parts


def _predict(
    module: nn.Module, learner: MAML | MetaSGD, names: list[str], parts: Mapping[str, nn.Module], x: Tensor
) -> Tensor:
    """Predict by the learner, or by the module with the learner's parameters in place of its submodules'."""
    if "" in parts:
        prediction: Tensor = learner(x)
    else:
        fast = dict(zip(names, learner.module.parameters(), strict=True))
        prediction = functional_call(module, fast, (x,))
    return prediction


def _restore_buffers(module: nn.Module, values: Params) -> None:
    for name, b in module.named_buffers():
        b.detach().copy_(values[name])
