"""What a model does that cannot be meta-learned, said with the remedy instead of in torch's own terms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from metalearn.errors import NonFiniteLossError

_IN_PLACE = (
    "the model changes it in place, so that every later pass sees something else. Compute a new tensor: w = 0.9 * w, "
    "not w *= 0.9 or w.mul_(0.9); no inplace=True in a first layer."
)
_OVERWRITES = (
    "the model overwrites a tensor in place that its gradient needs, or that tasks share: a parameter, an input or an "
    "activation. Compute a new tensor: w = 0.9 * w, not w *= 0.9 or w.mul_(0.9); h = h + 1, not h += 1."
)
_DATA = (
    "the model reads or writes .data, which hides from autograd what it does. Read with .detach(), and compute a new "
    "tensor instead of writing: w = 0.9 * w."
)
_RECURRENT = (
    "nn.LSTM, nn.GRU and nn.RNN cannot be batched over tasks by torch.vmap, and their cuDNN kernels have no second "
    "derivative. Write the recurrence out of nn.Linear layers, one time step after the other."
)
_KNOWN = (
    (r"leaf Variable that requires grad is being used in an in-place", _OVERWRITES),
    (r"refers to a single memory location", _OVERWRITES),
    (r"modified by an inplace operation", _OVERWRITES),
    (r"would mutate a captured Tensor|vmap: inplace arithmetic", _OVERWRITES),
    (r"accessing `data` under vmap", _DATA),
    (
        r"data-dependent control flow|calling \.item\(\) on a Tensor",
        "the model or the loss branches on a tensor's values, or reads one with .item(), which cannot be batched over "
        "tasks. Choose with torch.where(condition, a, b).",
    ),
    (r"Batching rule not implemented for aten::(lstm|gru|rnn)", _RECURRENT),
    (r"derivative for '?(aten::)?_(cudnn|thnn|miopen).*(rnn|lstm|gru)", _RECURRENT),
    (
        r"derivative for '?(aten::)?_scaled_dot_product_\w+_backward",
        "this attention kernel has no second derivative. metalearn asks for one that has, and the model overrules it: "
        "remove the sdpa_kernel(...) from the model, or name SDPBackend.MATH in it.",
    ),
)


@contextmanager
def explained() -> Iterator[None]:
    """Torch's errors that stand for a known fault of the model become a ValueError that names the remedy."""
    try:
        yield
    except RuntimeError as error:
        for pattern, remedy in _KNOWN:
            if re.search(pattern, str(error)):
                raise ValueError(f"{remedy} (torch: {str(error).splitlines()[0]})") from error
        raise


@contextmanager
def unchanged(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuse a forward pass that writes to what it is given.

    Args:
        tensors: by what the message calls them.

    Raises:
        ValueError: naming the tensor.
    """
    versions = {name: t._version for name, t in tensors.items() if not t.is_inference()}  # counts changes in place
    yield
    for name, version in versions.items():
        if tensors[name]._version != version:
            raise ValueError(f"{name}: {_IN_PLACE}")


def refuse_nonfinite(support_losses: list[Tensor], query_losses: Tensor | None = None) -> None:
    """Refuse a loss that is NaN or infinite, before anything is made of it.

    Args:
        support_losses: before each inner step, ``[T]`` each.
        query_losses: ``[T]``.

    Raises:
        NonFiniteLossError: naming the first inner step, and of its tasks the first.
    """
    rows = [*support_losses, *([] if query_losses is None else [query_losses])]
    if not rows:
        return
    losses = torch.stack(rows).detach()
    finite = torch.isfinite(losses)
    if finite.all():
        return
    step, task = (int(i) for i in (~finite).nonzero()[0])
    before = losses[step - 1, task].item() if step > 0 else None
    kind = "support" if step < len(support_losses) else "query"
    raise NonFiniteLossError(kind, task=task, step=step, value=losses[step, task].item(), before=before)
