"""learn2learn's MAML and Meta-SGD, used as in its own examples: one task after the other, on clones of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from learn2learn.algorithms import MAML, MetaSGD
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from metalearn.core.functional import grad_of
from metalearn.core.types import Episodes, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop, adapted_param_names, lr_key
from metalearn.metagrad.baselines.common import placed
from metalearn.metagrad.baselines.offers import SupportedSettings, UnsupportedSettingError, check_supported
from metalearn.metagrad.baselines.one_by_one import average_over_tasks

SUPPORTED: SupportedSettings = {"learned_lr": ("parameter",), "adapted": None}


def meta_gradient(
    module: nn.Module,
    episodes: Episodes,
    inner: InnerLoop,
    *,
    loss: Loss = cross_entropy,
    params: Params | None = None,
) -> MetaGradient:
    """As ``metalearn.meta_gradient``; ``engine`` and ``task_chunk`` mean nothing here.

    Where ``inner.adapted`` names a head, MAML (or Meta-SGD) wraps that alone, as in its example of ANIL. The body is
    computed anew in every step, and of support and query sets apart; the example does both at once, before the steps.

    The module is not changed: neither its parameters and buffers nor their ``.grad``.

    Args:
        module: the model.
        episodes: T tasks.
        inner: the inner loop: plain steps, of all parameters or of whole submodules, with step sizes learned for every
            entry or with one that is given.
        loss: one task's mean loss.
        params: theta, in place of the module's own parameters; the work is then done on a copy of the module.

    Raises:
        NotOfferedError: for any other setting, and for learned step sizes where parameters are frozen or shared.
        ValueError: if ``params`` are not the module's.

    Reference: Arnold et al. 2020, arXiv 2008.12284; its ``examples/vision/maml_omniglot.py`` and
    ``examples/vision/anil_fc100.py``; Li et al. 2017 (Meta-SGD), arXiv 1707.09835.
    """
    check_supported("learn2learn", inner, offers=SUPPORTED)
    module, theta = placed(module, params, inner)
    parts = _whole_submodules(module, adapted_param_names(theta, inner))
    names = [_within(prefix, name) for prefix, part in parts.items() for name, _ in part.named_parameters()]
    algorithm = _algorithm(parts[""] if "" in parts else nn.ModuleList(parts.values()), theta, names, inner)
    grads = {name: torch.zeros_like(p) for name, p in theta.items()}
    losses, predictions, support_losses = [], [], []
    for support_x, support_y, query_x, query_y in zip(
        episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True
    ):
        with _buffers_restored(module):  # clones share them
            learner = algorithm.clone()
            for _ in range(inner.steps):
                support_loss = loss(_predict(module, learner, names, parts, support_x), support_y)
                support_losses.append(support_loss.detach())
                learner.adapt(support_loss)
            prediction = _predict(module, learner, names, parts, query_x)
            query_loss = loss(prediction, query_y)
            for name, g in grad_of(query_loss / episodes.tasks, theta, create_graph=False).items():
                grads[name] += g
        losses.append(query_loss.detach())
        predictions.append(prediction.detach())
    return average_over_tasks(grads, losses, predictions, support_losses)


def _algorithm(wrapped: nn.Module, theta: Params, names: list[str], inner: InnerLoop) -> MAML | MetaSGD:
    """What is cloned for every task; ``names`` in theta of the wrapped module's parameters."""
    if inner.learned_lr is None:
        return MAML(wrapped, lr=inner.lr, first_order=not inner.second_order, allow_nograd=True)
    if not theta.keys() >= set(names) or len(list(wrapped.named_parameters(remove_duplicate=False))) > len(names):
        # It would stop at the first, and of the second leave one of the places as it was.
        raise UnsupportedSettingError(
            "learn2learn", "learned_lr where parameters are frozen or shared", "its MetaSGD takes each once, and all"
        )
    return MetaSGD(wrapped, first_order=not inner.second_order, lrs=[theta[lr_key(name)] for name in names])


def _whole_submodules(module: nn.Module, adapted: list[str]) -> dict[str, nn.Module]:
    """The largest submodules whose trainable parameters are together those that are adapted, by name."""
    left, parts = set(adapted), {}
    for prefix, part in module.named_modules():  # the module itself first, under the name ""
        own = {_within(prefix, name) for name, p in part.named_parameters() if p.requires_grad}
        if own and own <= left:
            parts[prefix] = part
            left -= own
    if left:
        raise UnsupportedSettingError(
            "learn2learn",
            f"adapted={{{', '.join(map(repr, sorted(adapted)))}}}",
            f"it adapts whole submodules, and {', '.join(sorted(left))} is part of one",
        )
    return parts


def _within(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _predict(
    module: nn.Module, learner: MAML | MetaSGD, names: list[str], parts: Mapping[str, nn.Module], x: Tensor
) -> Tensor:
    """The learner's own forward pass, or the module's with the learner in the place of its parts."""
    if "" in parts:
        prediction: Tensor = learner(x)
    else:
        fast = dict(zip(names, learner.module.parameters(), strict=True))
        prediction = functional_call(module, fast, (x,))
    return prediction


@contextmanager
def _buffers_restored(module: nn.Module) -> Iterator[None]:
    before = {name: b.clone() for name, b in module.named_buffers()}
    try:
        yield
    finally:
        for name, b in module.named_buffers():
            b.detach().copy_(before[name])
