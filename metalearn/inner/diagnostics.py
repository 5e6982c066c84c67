"""What a model does that cannot be meta-learned, said with the remedy instead of in torch's own terms."""

from __future__ import annotations

import dis
import re
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from metalearn.core.errors import OUT_OF_MEMORY, NonFiniteLossError
from metalearn.core.graph_checks import ACTIVATION_CHECKPOINT_ERROR

_IN_PLACE = (
    "the model changes it in place, so that every later pass sees something else. Compute a new tensor: w = 0.9 * w, "
    "not w *= 0.9 or w.mul_(0.9); no inplace=True in a first layer, no max_norm= of an embedding."
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
    "cuDNN's kernels for nn.LSTM, nn.GRU and nn.RNN have no second derivative. Call the layer inside of "
    "torch.backends.cudnn.flags(enabled=False), or write the recurrence out of nn.Linear layers."
)
_KNOWN = (
    (r"leaf Variable that requires grad is being used in an in-place", _OVERWRITES),
    (r"refers to a single memory location", _OVERWRITES),
    (r"modified by an inplace operation", _OVERWRITES),
    (r"would mutate a captured Tensor|vmap: inplace arithmetic", _OVERWRITES),
    (r"accessing `data` under vmap", _DATA),
    (r"derivative for '?(aten::)?_(cudnn|thnn|miopen).*(rnn|lstm|gru)", _RECURRENT),
    (
        r"derivative for '?(aten::)?_scaled_dot_product_\w+_backward",
        "this attention kernel has no second derivative. metalearn asks for one that has, and the model overrules it: "
        "remove the sdpa_kernel(...) from the model, or name SDPBackend.MATH in it.",
    ),
    (r"use_reentrant=True|Checkpointing is not compatible", ACTIVATION_CHECKPOINT_ERROR),
    (
        r"aot_autograd does not currently support double backward",
        "a part of the model is compiled (torch.compile), which has no second derivative. Pass the module itself, "
        "before it is compiled, or take second_order=False: first-order MAML.",
    ),
    (
        r"numpy\(\)|to convert to a numpy",
        "the model or the loss goes through numpy, which has no gradients. Compute it with torch.",
    ),
    (
        r"device-side assert",
        "an index was out of range on the GPU, most likely a label outside of 0 to N - 1 for a model with N outputs. "
        "Run it again on the CPU, which says which; this process has lost its GPU.",
    ),
)
_NO_DERIVATIVE = (
    r"(?:derivative for '?(?:aten::)?|double backwards on )_?(\w+?)(_(?:backward|grad)\w*)?(?:: \w+)?'? (?:is )?not "
)
"""What torch says of an operation that it cannot differentiate; of one that ends in _backward, not twice."""
_INSTEAD = {
    "embedding_bag": "nn.Embedding and a mean over its words in the place of nn.EmbeddingBag",
    "multi_margin_loss": "cross_entropy in its place",
    "multilabel_margin_loss": "binary_cross_entropy_with_logits in its place",
}
"""Operations without a second derivative that have one beside them."""
_MISFITS = (
    (r"\bdevice\b", "Move the model, its parameters and the examples to one device: .to(device)."),
    (
        r"out of (bounds|range)",
        "Labels must be 0 to N - 1 for a model with N outputs, and words below the number of an embedding's rows.",
    ),
    (
        r"\b(d|D)?types?\b|not implemented for '",
        "Give inputs and parameters one dtype, as in images.float() / 255, and class labels as int64: y.long().",
    ),
    (
        r"more than 1 (value per channel|spatial element)",
        "This normalisation takes statistics over what it is given: give sets of two examples or more, or take "
        "nn.GroupNorm or nn.LayerNorm.",
    ),
    (
        r"(?i)\b(shapes?|sizes?|dimensions?|dims?|channels|[1-5]-?D|broadcast\w*)\b",
        "The model is given one task's examples, [S or Q, ...]: compare their shapes with those that it takes.",
    ),
)
_MOST_PARAMETERS = 4  # that a message lists
_PYTHONS = r"(changed size|mutated) during iteration|generator|super\(\)|reentrant"
"""What Python itself raises as a RuntimeError."""
_TORCHS_INDEX = r"(?i)dimension|tensor|in self|target"
"""What torch says of an index out of range, and a list does not."""


@contextmanager
def explain_torch_errors(*given: Mapping[str, object]) -> Iterator[None]:
    """Torch's errors become a ValueError that names the remedy if the fault is a known one, and else what went in.

    What a model or a loss raises itself, and running out of memory, pass unchanged.

    Args:
        given: tensors by name, for the message: the examples, and then parameters, of which it lists a few.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if isinstance(error, RuntimeError) and (remedy := _known_remedy(str(error))):
            raise ValueError(f"{remedy} (torch: {_first_line(_root(error))})") from error
        if not is_of_torch(error):
            raise
        said, (name, kind) = _first_line(error), _layer(error)
        place = f"layer '{name}' ({kind})" if name else "the model or the loss"
        raise ValueError(
            f"{place} cannot compute with what it is given: {said.rstrip('.')}.{_advice(said, given)} Given: "
            f"{_given(given, name)}."
        ) from error


def _first_line(error: BaseException) -> str:
    return textwrap.shorten((str(error).splitlines() or [type(error).__name__])[0], 400)


def _root(error: BaseException) -> BaseException:
    """Return torch's own error, where another function of metalearn's has put its words around it."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _known_remedy(said: str) -> str | None:
    """Return what to do about a fault that has nothing to do with the tensors that were given."""
    for pattern, remedy in _KNOWN:
        if re.search(pattern, said):
            return remedy
    if (found := re.search(_NO_DERIVATIVE, said)) is None:
        return None
    operation, twice = found.groups()
    if not twice and "double backwards" not in said:
        return (
            f"torch has no derivative of {operation}, which the model or the loss computes. Take another operation, or "
            ".detach() what goes into it, if it is a constant."
        )
    instead = _INSTEAD.get(operation, "another operation in its place")
    return (
        f"{operation} has no second derivative in torch, and the model or the loss computes it. Take {instead}, or "
        "second_order=False: first-order MAML, which needs none."
    )


def _advice(said: str, given: Sequence[Mapping[str, object]]) -> str:
    """Return the remedy that torch's words call for, and no guess where they call for none."""
    if re.search(r"[Ss]parse", said):
        tensors = [value for named in given for value in named.values() if isinstance(value, Tensor)]
        if any(t.layout != torch.strided for t in tensors):
            return " Give dense tensors: x.to_dense()."
        return " If an embedding gives sparse gradients (sparse=True), build it with sparse=False."
    return next((f" {remedy}" for pattern, remedy in _MISFITS if re.search(pattern, said)), "")


def _layer(error: Exception) -> tuple[str, str]:
    """Return the dotted name and the type of the innermost module whose forward pass raised; empty outside of one."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [m for m in (frame.f_locals.get("self") for frame in frames) if isinstance(m, nn.Module)]
    if not modules:
        return "", ""
    names = {id(m): name for name, m in modules[0].named_modules()}
    return names.get(id(modules[-1]), ""), type(modules[-1]).__name__


def _given(given: Sequence[Mapping[str, object]], layer: str) -> str:
    """List the examples and a few parameters, those of the layer first."""
    examples, *others = given or ({},)
    parameters = {name: value for named in others for name, value in named.items()}
    names = sorted(parameters, key=lambda name: not (layer and name.startswith(f"{layer}.")))
    shown = [_shown(name, value) for name, value in examples.items()]
    shown += [_shown(name, parameters[name]) for name in names[:_MOST_PARAMETERS]]
    more = len(names) - _MOST_PARAMETERS
    return ", ".join(shown) + (f" and {more} more parameters" if more > 0 else "")


def is_of_torch(error: Exception) -> bool:
    """Return whether torch raised it: in its Python code, or in C++ where no ``raise`` of anybody else's stands."""
    if isinstance(error, (RecursionError, torch.AcceleratorError)) or re.search(
        f"{OUT_OF_MEMORY}|{_PYTHONS}", str(error)
    ):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None, "it was raised"
    frame = trace.tb_frame
    if str(frame.f_globals.get("__name__")).partition(".")[0] == "torch":
        return True
    if frame.f_code.co_code[trace.tb_lasti : trace.tb_lasti + 1] == bytes([dis.opmap["RAISE_VARARGS"]]):
        return False
    return isinstance(error, RuntimeError) or (
        isinstance(error, IndexError) and re.search(_TORCHS_INDEX, str(error)) is not None
    )


def _shown(name: str, value: object) -> str:
    """A tensor's shape, dtype and device, and the range of whole numbers."""
    if not isinstance(value, Tensor):
        return f"{name} {type(value).__name__}"
    text = f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if whole and value.numel() and value.layout == torch.strided and value.device.type == "cpu":
        text += f" from {value.min().item()} to {value.max().item()}"
    return text


@contextmanager
def check_no_inplace_writes(tensors: Mapping[str, Tensor]) -> Iterator[None]:
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


_UNCHECKED: ContextVar[bool] = ContextVar("losses_unchecked", default=False)


@contextmanager
def defer_loss_checks() -> Iterator[None]:
    """Have ``check_losses_finite`` do nothing inside: on a GPU, reading a loss waits for all work before it.

    Whoever asks for this looks at the losses and the gradients that come out, before anything is made of them.
    """
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def loss_checks_deferred() -> bool:
    """Return whether this is inside ``defer_loss_checks``."""
    return _UNCHECKED.get()


def check_losses_finite(support_losses: list[Tensor], query_losses: Tensor | None = None) -> None:
    """Refuse a loss that is NaN or infinite, before anything is made of it; inside ``defer_loss_checks``, do nothing.

    Args:
        support_losses: before each inner step, ``[T]`` each.
        query_losses: ``[T]``.

    Raises:
        NonFiniteLossError: naming the first inner step, and of its tasks the first.
    """
    rows = [*support_losses, *([] if query_losses is None else [query_losses])]
    if not rows or loss_checks_deferred():
        return
    losses = torch.stack(rows).detach()
    finite = torch.isfinite(losses)
    if finite.all():
        return
    step, task = (int(i) for i in (~finite).nonzero()[0])
    before = losses[step - 1, task].item() if step > 0 else None
    kind = "support" if step < len(support_losses) else "query"
    raise NonFiniteLossError(kind, task=task, step=step, value=losses[step, task].item(), before=before)
