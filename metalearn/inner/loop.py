"""The inner loop: K steps; ``second_order`` decides whether their gradients carry a graph (MAML) or not (FOMAML).

    theta_0 = theta,    theta_{k+1} = theta_k - lr * dL_support(theta_k) / dtheta_k

(Finn, Abbeel & Levine 2017, arXiv 1703.03400, section 2.2.) The fast weights of T tasks are stacked along dimension 0.
The total support loss is a sum over tasks whose parameters are disjoint, so one ``autograd.grad`` of the total is
every task's own gradient. ``vmap`` is applied to the forward pass alone, so ``create_graph`` stays in sight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metalearn.core.functional import check_forward
from metalearn.core.graph_checks import check_twice_differentiable
from metalearn.core.params import check_params, grad_of
from metalearn.core.types import Examples, Forward, Loss, Params, check_examples, named_leaves
from metalearn.inner.config import InnerLoop
from metalearn.inner.diagnostics import check_losses_finite, explain_torch_errors
from metalearn.inner.losses import task_losses
from metalearn.inner.meta_tensors import merge_meta, split_meta, taken_by
from metalearn.inner.state import (
    InnerState,
    adapted_param_names,
    apply_update,
    check_params_match_config,
    init_state,
    params_at_step,
)


def inner_step(
    forward: Forward,
    state: InnerState,
    support_x: Examples,
    support_y: Examples,
    inner: InnerLoop,
    *,
    loss: Loss = cross_entropy,
    k: int,
) -> tuple[InnerState, Tensor]:
    """Take the k-th gradient step of every task.

    If ``state``, from ``init_state`` or the step before, carries a graph and gradients are enabled, the result is
    differentiable through it, and with ``inner.second_order`` through the inner gradient as well. ``support_x`` and
    ``support_y`` are ``[T, S, ...]``, and k counts from 0.

    Returns:
        ``(state, losses)``: after the step, and the support losses ``[T]`` before it, detached.

    Raises:
        ValueError: if the support loss depends on no parameter that is adapted.
    """
    grads, losses = support_gradients(forward, state, support_x, support_y, inner, loss=loss, k=k)
    return apply_update(state, grads, inner, k), losses


def support_gradients(
    forward: Forward,
    state: InnerState,
    support_x: Examples,
    support_y: Examples,
    inner: InnerLoop,
    *,
    loss: Loss,
    k: int,
) -> tuple[Params, Tensor]:
    """Return g_k of every task, for the adapted parameters, and the support losses ``[T]``, detached.

    The gradients carry a graph in second order, if ``state`` does and gradients are enabled. The arguments are those of
    ``inner_step``.
    """
    names = adapted_param_names(state, inner)
    differentiable = torch.is_grad_enabled() and any(w.requires_grad for w in state.values())
    with torch.enable_grad():
        at = state if differentiable else {name: w.detach() for name, w in state.items()}
        adapted = {n: at[n] if at[n].requires_grad else at[n].detach().requires_grad_() for n in names}
        losses, _ = task_losses(forward, params_at_step({**at, **adapted}, inner, k), support_x, support_y, loss=loss)
        total, create_graph = losses.sum(), inner.second_order and differentiable
        if create_graph:
            check_twice_differentiable(total, adapted.values())
        grads = grad_of(total, adapted, create_graph=create_graph)
    return grads, losses.detach()


def adapt(
    forward: Forward,
    params: Params,
    support_x: Examples,
    support_y: Examples,
    inner: InnerLoop,
    *,
    loss: Loss = cross_entropy,
    meta: Params | None = None,
) -> Params:
    """Adapt the meta-parameters to T tasks.

    Args:
        forward: pure model of one task, from ``functionalize``.
        params: meta-parameters theta, each ``[...]``, with learned step sizes if ``inner`` has them.
        support_x: ``[T, S, ...]``, or a pytree of such tensors.
        support_y: ``[T, S, ...]``, likewise; int64 labels for the default loss.
        inner: the settings; with ``second_order`` the result is differentiable through the inner gradients.
        loss: ``loss(prediction, target)``, the mean over one task's examples.
        meta: tensors that the loss, the model or the rule takes by name, the same for all tasks; others are left out.

    Returns:
        Fast weights of the model, each ``[T, ...]``. They carry a graph back to ``params`` if those require a gradient
        and gradients are enabled; otherwise none, and no memory is spent on one.

    Raises:
        ValueError: if the support set's tensors do not lead with the same numbers of tasks and examples, or if the
            support loss depends on no parameter, or if ``inner`` does not fit the parameters.
        TypeError: if a parameter is not a floating-point tensor.
        NonFiniteLossError: if a support loss is NaN or infinite.

    Examples:
        >>> forward, theta = functionalize(nn.Linear(3, 2))
        >>> fast = adapt(forward, theta, torch.randn(8, 4, 3), torch.zeros(8, 4).long(), InnerLoop(lr=0.1, steps=2))
        >>> fast["weight"].shape
        torch.Size([8, 2, 3])
    """
    check_forward(forward)
    check_params(params)
    check_examples("support", support_x, support_y)
    if meta:
        check_params(meta, name="meta")
    taken = taken_by(forward, meta) | taken_by(loss, meta) | taken_by(inner.rule.update, meta)
    params = merge_meta(params, taken)
    check_params_match_config(params, inner)
    support_losses = []
    examples = named_leaves("support_x", support_x) | named_leaves("support_y", support_y)
    with explain_torch_errors(examples, params):
        state = init_state(forward, params, support_x, support_y, inner)
        for k in range(inner.steps):
            state, losses = inner_step(forward, state, support_x, support_y, inner, loss=loss, k=k)
            support_losses.append(losses)
        check_losses_finite(support_losses)
    return split_meta(params_at_step(state, inner, inner.steps))[0]
