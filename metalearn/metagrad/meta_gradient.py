"""Choose an engine and check its result; engines drop the Hessian for first-order MAML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch.nn.functional import cross_entropy

from metalearn.core.errors import NonFiniteGradientError
from metalearn.core.functional import check_forward
from metalearn.core.params import check_params, first_nonfinite, is_finite
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.inner import (
    InnerLoop,
    OuterLoss,
    check_meta,
    check_params_match_config,
    explain_torch_errors,
    loss_checks_deferred,
    merge_meta,
    split_meta,
)
from metalearn.metagrad.adjoint import adjoint
from metalearn.metagrad.checkpoint import checkpoint
from metalearn.metagrad.task_chunks import mean_over_passes, tasks_per_pass
from metalearn.metagrad.unroll import unroll

Engine = Callable[[Forward, Params, Episodes, InnerLoop, Loss], MetaGradient]

ENGINES: dict[str, Engine] = {"unroll": unroll, "checkpoint": checkpoint, "adjoint": adjoint}


def meta_gradient(
    forward: Forward,
    params: Params,
    episodes: Episodes | Sequence[Episodes],
    inner: InnerLoop,
    *,
    loss: Loss = cross_entropy,
    query_loss: Loss | None = None,
    meta: Params | None = None,
    engine: Engine | None = None,
) -> MetaGradient:
    """Compute the mean query loss over tasks after adaptation, and its gradient in the meta-parameters.

        grads = 1/T sum_t d L_query,t(adapt_t(theta)) / d theta

    Args:
        forward: pure model of one task, from ``functionalize``.
        params: meta-parameters theta, each ``[...]``, with learned step sizes if ``inner`` has them.
            They need not require gradients and are not changed.
        episodes: T tasks; or several such, for tasks of unequal size, as ``batches(..., unequal=True)`` makes them.
            They are computed one after another, and the mean is over all their tasks.
        inner: the inner loop; ``inner.engine`` selects how the gradient is computed, ``inner.task_chunk`` how many
            tasks are in memory at a time (which changes rounding and dropout masks alone).
        loss: ``loss(prediction, target)``, the mean over one task's examples.
        query_loss: another one for the query set; ``None``: the same.
        meta: tensors beside ``params`` that are meta-learned: a loss, the model's forward or the rule's ``update`` has
            arguments of their names (``def loss(prediction, y, weights)``). All tasks share them, and no step changes
            them.
        engine: replaces the one that ``inner.engine`` names: ``reptile``, ``Implicit()`` (iMAML). It is given all tasks
            at once, or ``inner.task_chunk``.

    On a CPU, where ``inner.task_chunk`` is ``None``, the model is first called once more with the support images of one
    task, to see how many tasks a pass may take: once for each model and shape.

    Returns:
        The loss, the gradients in ``params`` and in ``meta`` (``meta_grads``; zeros where the loss does not reach), the
        query predictions (a list for several episodes) and the support losses.

    Raises:
        ValueError: if the engine is ``auto``, a loss depends on no parameter, or the model cannot be batched over tasks
            or differentiated twice.
        TypeError: if a parameter is not a floating-point tensor.
        NonFiniteLossError: if a loss is NaN or infinite; naming the task and the inner step.
        NonFiniteGradientError: if the gradient is, though no loss is; naming the parameter and the task.

    Examples:
        >>> forward, theta = functionalize(nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 4, 3), torch.zeros(8, 4).long()
        >>> result = meta_gradient(forward, theta, Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=2))
        >>> result.grads["weight"].shape
        torch.Size([2, 3])
    """
    if engine is None and inner.engine not in ENGINES:
        raise ValueError(
            f"meta_gradient: engine={inner.engine!r} is for training, which measures; take one of {', '.join(ENGINES)}."
        )
    check_forward(forward)
    check_params(params)
    losses = loss if query_loss is None else OuterLoss(loss, query_loss)
    check_meta(meta, forward, loss, query_loss or loss, inner, own_engine=engine is not None)
    params = merge_meta(params, meta)
    check_params_match_config(params, inner, training=True)
    one_pass = engine or ENGINES[inner.engine]

    def compute(tasks: Episodes) -> MetaGradient:
        with explain_torch_errors(tasks.named_tensors(), params):
            return one_pass(forward, params, tasks, inner, losses)

    groups = _as_groups(episodes)
    sizes = [tasks_per_pass(forward, params, group, inner, engine=engine) for group in groups]
    result = mean_over_passes(compute, params, groups, sizes)
    if not loss_checks_deferred():
        locate_step = partial(_last_nonfinite_step, forward, params, inner=inner, loss=losses)
        _check_finite_gradient(result.grads, compute, (lambda _: None) if engine else locate_step, groups)
    grads, meta_grads = split_meta(result.grads)
    predictions = result.predictions[0] if isinstance(episodes, Episodes) else result.predictions
    return replace(result, grads=grads, meta_grads=meta_grads, predictions=predictions)


def _as_groups(episodes: Episodes | Sequence[Episodes]) -> Sequence[Episodes]:
    """Return groups of tasks, one if there is one ``Episodes``.

    Raises:
        TypeError: if it is anything else.
        ValueError: if there is no group.
    """
    groups = [episodes] if isinstance(episodes, Episodes) else episodes
    if not isinstance(groups, Sequence) or any(not isinstance(group, Episodes) for group in groups):
        kind = type(episodes).__name__
        raise TypeError(f"meta_gradient: episodes is {kind}; it must be Episodes, or a list of several.")
    if not groups:
        raise ValueError("meta_gradient: episodes is an empty list; give at least one Episodes.")
    return groups


def _check_finite_gradient(
    grads: Params,
    compute: Callable[[Episodes], MetaGradient],
    locate_step: Callable[[Episodes], int | None],
    groups: Sequence[Episodes],
) -> None:
    """Check that a meta-gradient is finite by one reduction; else find the task by a meta-gradient for each."""
    if is_finite(grads):
        return
    for task, episode in enumerate(task for group in groups for task in group.split(1)):
        if found := first_nonfinite(compute(episode).grads):
            raise NonFiniteGradientError(found[0], value=found[1], task=task, step=locate_step(episode))
    if found := first_nonfinite(grads):
        raise NonFiniteGradientError(found[0], value=found[1])


def _last_nonfinite_step(
    forward: Forward, params: Params, episode: Episodes, inner: InnerLoop, loss: Loss
) -> int | None:
    """Return the last inner step whose adjoint is not finite; ``None`` if there is none or it cannot be computed."""
    finite: dict[int, bool] = {}
    try:
        adjoint(forward, params, episode, inner, loss, callback=lambda k, lam: finite.update({k: is_finite(lam)}))
    except (ArithmeticError, ValueError, RuntimeError):  # the model does not support this engine
        return None
    return max((k for k, is_fine in finite.items() if not is_fine), default=None)
