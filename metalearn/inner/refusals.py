"""What a model does that cannot be meta-learned, said with the remedy instead of in torch's own terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from metalearn.types import Params

_IN_PLACE = (
    "the model changes a parameter in place, which would change the weights that all tasks share and cannot be "
    "differentiated. Compute a new tensor: w = 0.9 * w, not w *= 0.9, w.mul_(0.9) or w.data = ..."
)
_RECURRENT = (
    "nn.LSTM, nn.GRU and nn.RNN cannot be batched over tasks by torch.vmap, and their cuDNN kernels have no second "
    "derivative. Write the recurrence out of nn.Linear layers, one time step after the other."
)
_KNOWN = (
    (r"leaf Variable that requires grad is being used in an in-place", _IN_PLACE),
    (r"refers to a single memory location", _IN_PLACE),
    (r"modified by an inplace operation", _IN_PLACE),
    (r"accessing `data` under vmap", _IN_PLACE),
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
def unchanged(params: Params) -> Iterator[None]:
    """Refuse a forward pass that writes to its parameters.

    Raises:
        ValueError: naming the parameter.
    """
    versions = {name: p._version for name, p in params.items()}  # autograd's own count of changes in place
    yield
    for name, version in versions.items():
        if params[name]._version != version:
            raise ValueError(f"parameter '{name}': {_IN_PLACE}")
