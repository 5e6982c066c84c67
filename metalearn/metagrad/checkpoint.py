"""Engine ``checkpoint``: exact second order; recompute each inner step in the backward pass. No file is written.

    lam_K = dL_query(theta_K),    lam_k = (d theta_{k+1} / d theta_k)^T lam_{k+1},    meta-gradient = lam_0

Only the fast weights between the steps are kept. The transposed Jacobian of a step is autograd's, whatever the step
does, as in ``unroll``, so every operation must be twice differentiable. One inner step costs one first-order step more
than under ``unroll``. (Chen et al. 2016, arXiv 1604.06174, with inner steps as segments.)

``torch.utils.checkpoint`` around each step gives the same and was measured slower: the inner gradient reads the saved
tensors within the step already, so that the step is computed once more in the forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalearn.core.params import vjp
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop, InnerState
from metalearn.metagrad.common import run_forward
from metalearn.metagrad.trajectory import StepFn


def checkpoint(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    """Compute the meta-gradient of one chunk of tasks; arguments and result as for ``metalearn.meta_gradient``."""
    forward_pass = run_forward(forward, params, episodes, inner, loss)
    lam, recomputed = forward_pass.lam, {}
    for before in forward_pass.trajectory.reversed_steps():
        with before.replay_rng():
            k, step_fn = before.step, forward_pass.trajectory.step_fn
            recomputed[k], lam = vjp_step(step_fn, k, before.state, lam)
        lam = forward_pass.add_query_gradient(before, lam)
    return forward_pass.result(lam, recomputed)


def vjp_step(step_fn: StepFn, k: int, state: InnerState, lam: Params) -> tuple[Tensor, Params]:
    """Return the total support loss before the k-th inner step, and the step's transposed Jacobian times ``lam``."""
    with torch.enable_grad():
        at = {name: w.detach().requires_grad_() for name, w in state.items()}
        after, losses = step_fn(k, at)
        return losses.sum(), vjp(after, at, lam)
