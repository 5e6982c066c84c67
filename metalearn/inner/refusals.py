"""What a model does that cannot be meta-learned, said with the remedy instead of in torch's own terms."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from metalearn.errors import OUT_OF_MEMORY, NonFiniteLossError

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
    (
        r"device-side assert",
        "an index was out of range on the GPU, most likely a label outside of 0 to N - 1 for a model with N outputs. "
        "Run it again on the CPU, which says which; this process has lost its GPU.",
    ),
)
_MISFITS = (
    (r"[Ss]parse", "Give dense tensors: x.to_dense()."),
    (r"\bdevice\b", "Move the model, its parameters and the examples to one device: .to(device)."),
    (
        r"out of (bounds|range)",
        "Labels must be 0 to N - 1 for a model with N outputs, and words below the number of an embedding's rows.",
    ),
    (
        r"type|not implemented for",
        "Give inputs and parameters one dtype, as in images.float() / 255, and class labels as int64: y.long().",
    ),
    (r"", "The model is given one task's examples, [S or Q, ...]: compare their shapes with those that it takes."),
)
_PYTHONS = r"(changed size|mutated) during iteration|generator|super\(\)|reentrant"
"""What Python itself raises as a RuntimeError."""
_TORCHS_INDEX = r"(?i)dimension|tensor|in self|target"
"""What torch says of an index out of range, and a list does not."""


@contextmanager
def explained(*given: Mapping[str, object]) -> Iterator[None]:
    """Torch's errors become a ValueError that names the remedy if the fault is a known one, and else what went in.

    What a model or a loss raises itself, and running out of memory, pass unchanged.

    Args:
        given: tensors by name, for the message.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        for pattern, remedy in _KNOWN:
            if isinstance(error, RuntimeError) and re.search(pattern, str(error)):
                raise ValueError(f"{remedy} (torch: {said})") from error
        if not _is_misfit(error):
            raise
        remedy = next(remedy for pattern, remedy in _MISFITS if re.search(pattern, said))
        shown = ", ".join(_shown(name, value) for tensors in given for name, value in tensors.items())
        raise ValueError(
            f"the model or the loss cannot compute with what it is given: {said.rstrip('.')}. {remedy} Given: {shown}."
        ) from error


def _is_misfit(error: Exception) -> bool:
    """Whether torch refuses tensors: in its Python code, or in C++ where no ``raise`` of anybody else's stands."""
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


_UNCHECKED: ContextVar[bool] = ContextVar("losses_unchecked", default=False)


@contextmanager
def losses_unchecked() -> Iterator[None]:
    """Inside, ``refuse_nonfinite`` reads nothing and refuses nothing: on a GPU, reading waits for all work before it.

    Whoever asks for this looks at the losses and the gradients that come out, before anything is made of them.
    """
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def checks_are_off() -> bool:
    """Return whether this is inside ``losses_unchecked``."""
    return _UNCHECKED.get()


def refuse_nonfinite(support_losses: list[Tensor], query_losses: Tensor | None = None) -> None:
    """Refuse a loss that is NaN or infinite, before anything is made of it; inside ``losses_unchecked``, do nothing.

    Args:
        support_losses: before each inner step, ``[T]`` each.
        query_losses: ``[T]``.

    Raises:
        NonFiniteLossError: naming the first inner step, and of its tasks the first.
    """
    rows = [*support_losses, *([] if query_losses is None else [query_losses])]
    if not rows or checks_are_off():
        return
    losses = torch.stack(rows).detach()
    finite = torch.isfinite(losses)
    if finite.all():
        return
    step, task = (int(i) for i in (~finite).nonzero()[0])
    before = losses[step - 1, task].item() if step > 0 else None
    kind = "support" if step < len(support_losses) else "query"
    raise NonFiniteLossError(kind, task=task, step=step, value=losses[step, task].item(), before=before)
