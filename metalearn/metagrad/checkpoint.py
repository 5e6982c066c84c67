"""The memory of one inner step: each is taken again, with its graph, when the backward pass comes to it.

    lam_K = dL_query(theta_K),    lam_k = (d theta_{k+1} / d theta_k)^T lam_{k+1},    meta-gradient = lam_0

Only the fast weights between the steps are kept. The transposed Jacobian of a step is autograd's, whatever the step
does, as in ``unroll``, and so is what an operation must offer: a derivative of its derivative. One inner step costs one
first-order step more than under ``unroll``. (Chen et al. 2016, arXiv 1604.06174, with inner steps as segments.)

``torch.utils.checkpoint`` around each step gives the same and was measured slower: the inner gradient reads the saved
tensors within the step already, and so has the step computed once more on the way forwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalearn.core.functional import vjp
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.inner import InnerLoop
from metalearn.metagrad.common import run_forward
from metalearn.metagrad.trajectory import StepFn


def checkpoint(forward: Forward, params: Params, episodes: Episodes, inner: InnerLoop, loss: Loss) -> MetaGradient:
    """The meta-gradient of one chunk of tasks; arguments and result as in ``metalearn.meta_gradient``."""
    way = run_forward(forward, params, episodes, inner, loss)
    lam, repeated = way.lam, {}
    for start in way.trajectory.back():
        with start.replay_rng():
            repeated[start.step], lam = pull_back_step(way.trajectory.step, start.step, start.carry, lam)
        lam = way.add_query_gradient(start, lam)
    way.trajectory.check_recomputation(repeated)
    return way.outcome(lam)


def pull_back_step(step: StepFn, k: int, carry: Params, lam: Params) -> tuple[Tensor, Params]:
    """Total support loss of the k-th inner step at ``carry``, and the step's transposed Jacobian times ``lam``."""
    with torch.enable_grad():
        at = {name: w.detach().requires_grad_() for name, w in carry.items()}
        after, losses = step(k, at)
        return losses.sum(), vjp(after, at, lam)
