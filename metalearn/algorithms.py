"""Named algorithms: each composes an update rule, a mask of parameters, an objective and an engine.

    algorithm = anil(InnerLoop(lr=0.4, steps=5), module_parts(module))
    theta = algorithm.init(params)
    result = algorithm.meta_gradient(forward, theta, episodes)

A new one is a function that returns an ``Algorithm``. First-order MAML is ``maml`` with ``second_order=False``. Only
Reptile and iMAML have their own gradient.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch.nn.functional import cross_entropy

from metalearn import metagrad
from metalearn.core.deprecation import renamed
from metalearn.core.module_parts import ModuleParts
from metalearn.core.short_repr import short_repr
from metalearn.core.types import Episodes, Forward, Loss, MetaGradient, Params
from metalearn.inner import (
    InnerLoop,
    MetaCurvature,
    PrototypeHead,
    ZeroContext,
    with_learned_lrs,
    with_per_step_params,
    with_transform,
)
from metalearn.metagrad import Engine
from metalearn.metagrad.implicit import Implicit
from metalearn.metagrad.reptile import reptile as reptile_gradient

Annealing = Callable[[InnerLoop, float], InnerLoop]
"""The inner loop at a training progress in [0, 1]."""


def _unchanged(inner: InnerLoop, progress: float) -> InnerLoop:
    return inner


@renamed(
    at="inner_at",
    testing="eval_inner",
    heaviest="peak_memory_inner",
    keeps_statistics="tracks_norm_statistics",
    figures="diagnostics",
    anneals="is_annealed",
)
@dataclass(frozen=True)
class Algorithm:
    """The parameters and settings that are meta-learned, and their gradient.

    Args:
        name: as papers call it.
        inner: the inner loop in training.
        engine: replaces the one that ``inner.engine`` names; ``None`` takes that.
        annealing: how the inner loop changes in the course of training.
        tracks_norm_statistics: whether BatchNorm's statistics of every step are kept for non-transductive prediction.
        diagnostics: names of the scalars in the engine's ``MetaGradient.diagnostics``.
    """

    name: str
    inner: InnerLoop
    engine: Engine | None = None
    annealing: Annealing = _unchanged
    tracks_norm_statistics: bool = False
    diagnostics: tuple[str, ...] = ()

    __repr__ = short_repr

    @property
    def is_annealed(self) -> bool:
        """True if the inner loop changes in the course of training."""
        return self.annealing is not _unchanged

    def init(self, params: Params) -> Params:
        """Return theta: the model's parameters, with per-step values, learned step sizes and a learned transform."""
        return with_transform(with_learned_lrs(with_per_step_params(params, self.inner), self.inner), self.inner)

    def inner_at(self, progress: float) -> InnerLoop:
        """Return the inner loop at a training progress in [0, 1]."""
        return self.annealing(self.inner, progress)

    @property
    def peak_memory_inner(self) -> InnerLoop:
        """The inner loop that takes the most memory in training: in second order, with all query losses."""
        return dataclasses.replace(self.inner_at(0.0), second_order=self.inner.second_order)

    def eval_inner(self, steps: int) -> InnerLoop:
        """Return the inner loop for evaluation; it is never differentiated."""
        return dataclasses.replace(self.inner, steps=steps, second_order=False, query_weights=None)

    def meta_gradient(
        self,
        forward: Forward,
        theta: Params,
        episodes: Episodes | Sequence[Episodes],
        *,
        loss: Loss = cross_entropy,
        query_loss: Loss | None = None,
        meta: Params | None = None,
        progress: float = 1.0,
    ) -> MetaGradient:
        """Compute ``metalearn.meta_gradient`` at a training progress in [0, 1].

        In a hand-written training loop pass ``progress=step / steps`` for annealed algorithms (MAML++).
        """
        inner = self.inner_at(progress)
        return metagrad.meta_gradient(
            forward, theta, episodes, inner, loss=loss, query_loss=query_loss, meta=meta, engine=self.engine
        )


def maml(inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Build model-agnostic meta-learning: all parameters are adapted, from a learned initialization.

        theta_{k+1} = theta_k - alpha dL_support(theta_k),    min over theta of L_query(theta_K)

    Finn, Abbeel & Levine 2017, arXiv 1703.03400, sections 2.2 and 3.1, algorithms 1 and 2; first order: section 5.2.
    """
    return Algorithm("maml", inner)


def anil(inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Build ANIL (almost no inner loop): the head alone is adapted, and all tasks share the features.

        head_{k+1} = head_k - alpha dL_support(head_k, body),    min over head_0 and body

    Raghu et al. 2020, arXiv 1909.09157, section 4.

    Raises:
        ValueError: if the model has no linear head.
    """
    return Algorithm("anil", dataclasses.replace(inner, adapted_params=frozenset(_head("anil", parts))))


def boil(inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Build BOIL (body only in the inner loop): all but the head is adapted, so that features change with the task.

        body_{k+1} = body_k - alpha dL_support(head, body_k),    min over head and body_0

    Oh et al. 2021, arXiv 2008.08882, section 3.

    Raises:
        ValueError: if the model has no linear head, or nothing else.
    """
    _head("boil", parts)
    if not parts.body:
        raise ValueError("boil: the model is its head alone, so that there is no body to adapt; take maml.")
    return Algorithm("boil", dataclasses.replace(inner, adapted_params=parts.body))


def meta_sgd(inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Build Meta-SGD: a learned step size for every entry of every parameter, which may become negative.

        theta_{k+1} = theta_k - alpha * dL_support(theta_k),    min over theta and alpha

    Li et al. 2017, arXiv 1707.09835, section 3. They start from random step sizes; here all start from ``inner.lr``.
    """
    return Algorithm("meta_sgd", dataclasses.replace(inner, learned_lr="parameter"))


def meta_curvature(inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Build Meta-Curvature: gradients are multiplied by learned matrices along each of their modes, identity at first.

        theta_{k+1} = theta_k - alpha M(dL_support(theta_k)),    min over theta and M

    Park & Oliva 2019, arXiv 1902.03356, section 3.2: MC2.
    """
    return Algorithm("meta_curvature", dataclasses.replace(inner, transform=MetaCurvature()))


def maml_pp(
    inner: InnerLoop,
    parts: ModuleParts,
    *,
    learned_lr: bool = True,
    multi_step_share: float = 0.15,
    first_order_share: float = 0.1,
    per_step_affine: bool = True,
    per_step_statistics: bool = True,
) -> Algorithm:
    """Build MAML++: five improvements, each optional. (The sixth, a cosine schedule, is the meta-optimizer's.)

        theta_{k+1,l} = theta_{k,l} - alpha_{k,l} dL_support(theta_k)_l for a tensor l,
        min over theta and alpha of the sum over k of w_k L_query(theta_k)

    Antoniou, Edwards & Storkey 2019, arXiv 1810.09502, section 4. As in their code, BatchNorm's scale and shift are not
    adapted if they are per step. The two shares replace the paper's numbers of epochs.

    Args:
        inner: with the initial value of learned step sizes.
        parts: of the model.
        learned_lr: LSLR, a step size for every parameter tensor and step.
        multi_step_share: MSL, the query loss after every step counts: for this share of the training, with
            weights that move from equal ones to the last step's alone. 0: the last step's loss from the start.
        first_order_share: DA, the first order for this share of the training, then the second. 0: none.
        per_step_affine: BNWB, BatchNorm's scale and shift for every step.
        per_step_statistics: BNRS, BatchNorm's statistics for every step, for non-transductive prediction.
    """
    if learned_lr:
        inner = dataclasses.replace(inner, learned_lr="layer_and_step")
    if per_step_affine and parts.norm_params:
        adapted = parts.all_params - parts.norm_params
        inner = dataclasses.replace(inner, per_step_params=parts.norm_params, adapted_params=adapted)

    annealing: Annealing = _unchanged
    if multi_step_share > 0 or first_order_share > 0:
        annealing = partial(_annealed, multi_step_share=multi_step_share, first_order_share=first_order_share)
    tracks_statistics = per_step_statistics and bool(parts.norm_params)
    return Algorithm("maml_pp", inner, annealing=annealing, tracks_norm_statistics=tracks_statistics)


def _annealed(inner: InnerLoop, progress: float, *, multi_step_share: float, first_order_share: float) -> InnerLoop:
    if progress < first_order_share:
        inner = dataclasses.replace(inner, second_order=False)
    if progress < multi_step_share and inner.steps > 1:
        weights = multi_step_weights(inner.steps, progress / multi_step_share)
        inner = dataclasses.replace(inner, query_weights=weights)
    return inner


def multi_step_weights(steps: int, progress: float) -> tuple[float, ...]:
    """Return w_0, ..., w_K of the query losses: from 1/K for each step to nearly all for the last.

        w_k = max((1 - progress) / K, 0.03 / K) for 0 < k < K,    w_K = 1 - the sum of the others

    As in the authors' code (arXiv 1810.09502, section 4, "annealed weighting").

    Examples:
        >>> multi_step_weights(2, 0.0)
        (0.0, 0.5, 0.5)
    """
    early = max(1 - progress, 0.03) / steps
    return (0.0, *[early] * (steps - 1), 1 - early * (steps - 1))


def reptile(inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Build Reptile: the mean displacement of adapted parameters, (theta - theta_K) / alpha, is the gradient.

        g = mean over tasks of (theta - theta_K) / alpha,    theta_{k+1} = theta_k - alpha dL(theta_k)

    Nichol, Achiam & Schulman 2018, arXiv 1803.02999, section 3. Training tasks adapt to support and query set together.
    """
    return Algorithm("reptile", dataclasses.replace(inner, second_order=False), engine=reptile_gradient)


def imaml(
    inner: InnerLoop,
    parts: ModuleParts,
    *,
    proximal_weight: float = 2.0,
    cg_steps: int = 5,
    damping: float = 0.0,
    strength: float | None = None,
) -> Algorithm:
    """Build implicit MAML: the meta-gradient at a proximal optimum, independent of the steps to it.

        phi = argmin L_support(phi) + lam/2 |phi - theta|^2,    g = (I + H / lam)^-1 dL_query(phi)

    Rajeswaran et al. 2019, arXiv 1909.04630, section 3, algorithms 1 and 2.

    Args:
        inner: takes the steps towards phi.
        parts: of the model.
        proximal_weight: lambda, the weight of the proximal term.
        cg_steps: conjugate gradients on I + H / lambda.
        damping: added to the diagonal.
        strength: the former name of ``proximal_weight``.
    """
    if strength is not None:
        warnings.warn("imaml: strength= is called proximal_weight= now", FutureWarning, stacklevel=2)
        proximal_weight = strength
    return Algorithm(
        "imaml",
        dataclasses.replace(inner, proximal_weight=proximal_weight),
        engine=Implicit(cg_steps=cg_steps, damping=damping),
        diagnostics=("cg_residual", "cg_residual_max"),
    )


def cavia(inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Build CAVIA (fast context adaptation): context parameters alone are adapted, from 0; all others are shared.

        c_0 = 0,    c_{k+1} = c_k - alpha dL_support(c_k, theta),    min over theta of L_query(c_K, theta)

    Zintgraf et al. 2019, arXiv 1810.03642, algorithm 1, section 3.

    Raises:
        ValueError: if the model has no parameter called ``context``.
    """
    if not parts.context_params:
        raise ValueError(
            "cavia: the model has no parameter called 'context'; take ContextMLP or ContextConv4 (model.context=100)."
        )
    start = ZeroContext(parts.context_params)
    return Algorithm("cavia", dataclasses.replace(inner, adapted_params=parts.context_params, initializer=start))


def protonet(inner: InnerLoop, parts: ModuleParts) -> Algorithm:
    """Build prototypical networks: the head is made of the classes' mean embeddings, without inner gradients.

        p(y = n | x) = softmax over n of -|f(x) - c_n|^2,    c_n = mean of f over the support examples of n

    Snell et al. 2017, arXiv 1703.05175, eq. 1 and 2; as a linear head by eq. 8. With ``inner.steps`` above 0 that head
    and the features are then adapted: Proto-MAML (Triantafillou et al. 2020, arXiv 1903.03096).

    Raises:
        ValueError: if the model has no linear head with an unshared weight and bias.
    """
    head = _head("protonet", parts)
    if [name.rpartition(".")[2] for name in head] != ["weight", "bias"]:
        raise ValueError(
            "protonet: the model's last linear layer needs a weight and a bias, which prototypes set, and has "
            f"{', '.join(head)}."
        )
    if shared := parts.tied.intersection(head):
        raise ValueError(
            f"protonet: the head shares {', '.join(sorted(shared))} with another layer, which prototypes would change "
            "as well. Give it a weight and a bias of its own, or name another layer: module_parts(module, head=...)."
        )
    return Algorithm("protonet", dataclasses.replace(inner, initializer=PrototypeHead(head[0], head[1])))


def _head(algorithm: str, parts: ModuleParts) -> tuple[str, ...]:
    if not parts.head:
        raise ValueError(
            f"{algorithm}: the model has no trainable nn.Linear to be its head; end it with one, or name "
            "it: module_parts(module, head=...)."
        )
    return parts.head


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    f.__name__: f for f in (maml, anil, boil, meta_sgd, meta_curvature, maml_pp, reptile, imaml, cavia, protonet)
}
"""By name; ``ALGORITHMS[name](inner, parts, **options)``."""
