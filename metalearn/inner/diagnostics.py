"""Name the task whose loss is NaN or infinite, and add to torch's errors what to do about the model or inputs."""

from __future__ import annotations

import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from metalearn.core.errors import NonFiniteLossError, is_out_of_memory
from metalearn.core.graph_checks import ACTIVATION_CHECKPOINT_ERROR

_IN_PLACE = (
    "the model changes it in place, so that every later pass sees something else. Compute a new tensor: w = 0.9 * w, "
    "not w *= 0.9 or w.mul_(0.9); no inplace=True in a first layer, no max_norm= of an embedding."
)
_KNOWN_ERRORS = (
    (
        r"leaf Variable that requires grad is being used in an in-place|refers to a single memory location"
        r"|modified by an inplace operation|would mutate a captured Tensor|vmap: inplace arithmetic",
        "the model overwrites a tensor in place that its gradient needs, or that tasks share: a parameter, an input or "
        "an activation. Compute a new tensor: w = 0.9 * w, not w *= 0.9 or w.mul_(0.9); h = h + 1, not h += 1.",
    ),
    (
        r"accessing `data` under vmap",
        "the model reads or writes .data, which hides from autograd what it does. Read with .detach(), and compute a "
        "new tensor instead of writing: w = 0.9 * w.",
    ),
    (
        r"derivative for '?(aten::)?_(cudnn|thnn|miopen).*(rnn|lstm|gru)",
        "cuDNN's kernels for nn.LSTM, nn.GRU and nn.RNN have no second derivative. Call the layer inside of "
        "torch.backends.cudnn.flags(enabled=False), or write the recurrence out of nn.Linear layers.",
    ),
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
        r"Failed to find C compiler",
        "torch compiles a kernel of this operation by Triton, which needs a C compiler: install gcc, or set "
        "TORCH_DISABLE_NATIVE_JIT=1 in the environment, and torch takes kernels that are compiled already.",
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
"""Torch's message about an operation without a derivative, or, if the name ends in _backward, without a second one."""
_REPLACEMENTS = {
    "embedding_bag": "nn.Embedding and a mean over its words in the place of nn.EmbeddingBag",
    "multi_margin_loss": "cross_entropy in its place",
    "multilabel_margin_loss": "binary_cross_entropy_with_logits in its place",
}
"""Twice differentiable replacements of operations without a second derivative."""
_ONE_DEVICE = "Move the model, its parameters and the examples to one device: .to(device)."
_INPUT_ERROR_HINTS = (
    (r"\bdevice\b", _ONE_DEVICE),
    (
        r"out of bounds|out of range in self|Dimension out of range",
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
_MAX_LISTED_PARAMETERS = 4


@contextmanager
def explain_torch_errors(*inputs: Mapping[str, object]) -> Iterator[None]:
    """Explain errors of the model or the loss.

    A known error of the model becomes a ``ValueError`` that names the remedy. Any other error keeps its type and
    message and gets a note: the layer, a hint where the message suggests one, and the tensors that were given.

    Args:
        inputs: tensors by name, for the note: the examples, and then parameters, of which it lists a few.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        message = str(error)
        if isinstance(error, RuntimeError) and (remedy := _known_remedy(message)):
            cause: BaseException = error
            while cause.__cause__ is not None:  # torch's own error, where metalearn has replaced it
                cause = cause.__cause__
            first_line = textwrap.shorten((str(cause).splitlines() or [type(cause).__name__])[0], 400)
            raise ValueError(f"{remedy} (torch: {first_line})") from error
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        raised_by_metalearn = str(frame.f_globals.get("__name__")).startswith("metalearn.")
        explained = raised_by_metalearn and isinstance(error, (ValueError, AssertionError))
        if not (explained or isinstance(error, RecursionError) or is_out_of_memory(error)):
            layer, kind = _innermost_layer(error)
            place = f"layer '{layer}' ({kind})" if layer else "the model or the loss"
            hint = _input_error_hint(message, inputs)
            note = f"Raised in {place}.{hint} Given: {_describe_inputs(inputs, layer)}."
            if sys.version_info >= (3, 11):
                error.add_note(note)
            else:
                error.args = (f"{message}\n{note}",)
        raise


def _known_remedy(message: str) -> str | None:
    """Return the remedy for a known error of the model, which every input would cause; ``None`` for other errors."""
    for pattern, remedy in _KNOWN_ERRORS:
        if re.search(pattern, message):
            return remedy
    if (found := re.search(_NO_DERIVATIVE, message)) is None:
        return None
    operation, is_backward = found.groups()
    if not is_backward and "double backwards" not in message:
        return (
            f"torch has no derivative of {operation}, which the model or the loss computes. Take another operation, or "
            ".detach() what goes into it, if it is a constant."
        )
    replacement = _REPLACEMENTS.get(operation, "another operation in its place")
    return (
        f"{operation} has no second derivative in torch, and the model or the loss computes it. Take {replacement}, or "
        "second_order=False: first-order MAML, which needs none."
    )


def _input_error_hint(message: str, inputs: Sequence[Mapping[str, object]]) -> str:
    """Return the remedy that the message suggests, or an empty string."""
    if re.search(r"[Ss]parse", message):
        tensors = [value for named in inputs for value in named.values() if isinstance(value, Tensor)]
        if any(t.layout != torch.strided for t in tensors):
            return " Give dense tensors: x.to_dense()."
        return " If an embedding gives sparse gradients (sparse=True), build it with sparse=False."
    devices = {value.device for named in inputs for value in named.values() if isinstance(value, Tensor)}
    if len(devices) > 1:  # torch may call it a type: torch.FloatTensor and torch.cuda.FloatTensor
        return f" {_ONE_DEVICE}"
    return next((f" {remedy}" for pattern, remedy in _INPUT_ERROR_HINTS if re.search(pattern, message)), "")


def _innermost_layer(error: Exception) -> tuple[str, str]:
    """Return the dotted name and the type of the innermost module whose forward pass raised; empty outside of one."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [m for m in (frame.f_locals.get("self") for frame in frames) if isinstance(m, nn.Module)]
    if not modules:
        return "", ""
    names = {id(m): name for name, m in modules[0].named_modules()}
    return names.get(id(modules[-1]), ""), type(modules[-1]).__name__


def _describe_inputs(inputs: Sequence[Mapping[str, object]], layer: str) -> str:
    """List the examples and a few parameters, those of the layer first."""
    examples, *others = inputs or ({},)
    parameters = {name: value for named in others for name, value in named.items()}
    names = sorted(parameters, key=lambda name: not (layer and name.startswith(f"{layer}.")))
    listed = [_describe_tensor(name, value) for name, value in examples.items()]
    listed += [_describe_tensor(name, parameters[name]) for name in names[:_MAX_LISTED_PARAMETERS]]
    more = len(names) - _MAX_LISTED_PARAMETERS
    return ", ".join(listed) + (f" and {more} more parameters" if more > 0 else "")


def _describe_tensor(name: str, value: object) -> str:
    """Return a tensor's shape, dtype and device, and the range of whole numbers."""
    if not isinstance(value, Tensor):
        return f"{name} {type(value).__name__}"
    text = f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if is_integer and value.numel() and value.layout == torch.strided and value.device.type == "cpu":
        text += f" from {value.min().item()} to {value.max().item()}"
    return text


@contextmanager
def check_no_inplace_writes(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise a ``ValueError`` that names the tensor, if a forward pass writes to one of its inputs."""
    versions = {name: t._version for name, t in tensors.items() if not t.is_inference()}  # counts in-place changes
    yield
    for name, version in versions.items():
        if tensors[name]._version != version:
            raise ValueError(f"{name}: {_IN_PLACE}")


_CHECKS_DEFERRED: ContextVar[bool] = ContextVar("loss_checks_deferred", default=False)


@contextmanager
def defer_loss_checks() -> Iterator[None]:
    """Disable ``check_losses_finite`` inside: on a GPU, reading a loss waits for all work before it.

    The caller must check the resulting losses and gradients before using them.
    """
    token = _CHECKS_DEFERRED.set(True)
    try:
        yield
    finally:
        _CHECKS_DEFERRED.reset(token)


def loss_checks_deferred() -> bool:
    """Return whether this is inside ``defer_loss_checks``."""
    return _CHECKS_DEFERRED.get()


def check_losses_finite(support_losses: list[Tensor], query_losses: Tensor | None = None) -> None:
    """Check that no support loss before each inner step, and no query loss, is NaN or infinite, ``[T]`` each.

    Do nothing inside ``defer_loss_checks``.

    Raises:
        NonFiniteLossError: naming the first inner step, and its first task.
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
