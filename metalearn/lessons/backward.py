"""Second derivatives through ``backward(create_graph=True)``, and why ``autograd.grad`` is safer.

``backward`` adds to ``x.grad``, which belongs to x. With a graph of its own, that gradient leads back to x:

    x -> x.grad -> its graph -> x
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metalearn.lessons.lesson import BLUE, GREEN, VERMILION, Check, Lesson, leaf, panels, source_of

_CLAIM = """\
backward(create_graph=True) leaves the first derivative in x.grad, with a graph. A second backward gives the second \
derivative only if x.grad is set to None in between. Otherwise the two are added, 6 + 2 = 8. Zeroing it in place with \
x.grad.zero_() changes the first derivative itself, which is the same tensor: the second derivative is then 0, without \
an error.

x.grad with a graph closes a cycle, x -> x.grad -> graph -> x, which keeps all three in memory. The cycle runs through \
C++, so Python's garbage collector does not free it either. torch warns of it once per process. autograd.grad returns \
the gradient and stores it nowhere: there is nothing to reset, and nothing leaks."""

_TENSORS = 40
_SIZE = 32_768  # numbers of float64 in each, 0.25 MiB


def by_backward(reset: Callable[[Tensor], object]) -> float:
    """Return the second derivative of x^2 at 3 by two backward passes."""
    x = leaf(3.0)
    (x**2).backward(create_graph=True)
    dy = grad_of(x)  # 2 x = 6, with a graph
    reset(x)
    dy.backward()  # adds 2 to x.grad, if there is one
    second = grad_of(x).item()
    x.grad = None  # otherwise x is never freed
    return second


def backward(x: Tensor) -> None:
    """Leave the gradient, with its graph, in x.grad."""
    (x**2).sum().backward(create_graph=True)


def backward_then_reset(x: Tensor) -> None:
    """Apply the remedy that torch's warning names."""
    (x**2).sum().backward(create_graph=True)
    x.grad = None


def autograd_grad(x: Tensor) -> None:
    """Compute the gradient without storing it in x."""
    torch.autograd.grad((x**2).sum(), x, create_graph=True)


def alive_after(differentiate: Callable[[Tensor], None]) -> tuple[str, str]:
    """Return whether x outlives its name, and whether it also outlives a garbage collection."""
    x = leaf(3.0)
    reference = weakref.ref(x)
    was_enabled = gc.isenabled()
    gc.disable()  # only reference counting frees memory
    differentiate(x)
    del x
    unnamed = "alive" if reference() is not None else "freed"
    if was_enabled:
        gc.enable()
    gc.collect()
    collected = "alive" if reference() is not None else "freed"
    break_cycle(reference)
    return unnamed, collected


def memory_held(differentiate: Callable[[Tensor], None]) -> list[float]:
    """Return the MiB of x and of its gradient that are alive after each of many tensors was dropped."""
    references: list[weakref.ref[Tensor]] = []
    mib = []
    for _ in range(_TENSORS):
        x = torch.ones(_SIZE, dtype=torch.float64, requires_grad=True)
        references.append(weakref.ref(x))
        differentiate(x)
        del x
        living = [tensor for ref in references if (tensor := ref()) is not None]
        mib.append(sum(x.nbytes + (0 if x.grad is None else x.grad.nbytes) for x in living) / 2**20)
        del living
    for ref in references:
        break_cycle(ref)
    return mib


def grad_of(x: Tensor) -> Tensor:
    """Return x.grad, which must exist."""
    assert x.grad is not None
    return x.grad


def break_cycle(reference: weakref.ref[Tensor]) -> None:
    """Break the cycle, so that the lesson itself leaks nothing."""
    if (x := reference()) is not None:
        x.grad = None


def cycle_warnings(differentiate: Callable[[Tensor], None]) -> list[str]:
    """Return the warnings about a reference cycle, even if this process has already had its one."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x = leaf(3.0)
            differentiate(x)
            x.grad = None
    finally:
        torch.set_warn_always(always)
    return [str(warning.message) for warning in caught if "reference cycle" in str(warning.message)]


def lesson() -> Lesson:
    """Run the lesson."""
    with warnings.catch_warnings():  # the warning is a check of its own
        warnings.filterwarnings("ignore", message=".*reference cycle")
        memory = {f.__name__: memory_held(f) for f in (backward, backward_then_reset, autograd_grad)}
        checks = [*_values(), *_lifetimes(), *_memory(memory)]
    warning = cycle_warnings(backward)
    checks += [
        Check("warnings of a cycle by backward", len(warning), 1, source="observed"),
        Check("warnings of a cycle by autograd.grad", len(cycle_warnings(autograd_grad)), 0, source="observed"),
    ]
    return Lesson(
        title="backward(create_graph=True): the same numbers, and a leak",
        claim=_CLAIM,
        code=source_of(leaf, grad_of, break_cycle, by_backward, alive_after, backward, autograd_grad),
        checks=checks,
        notes=[f"torch warns: {text.partition('. ')[0]}." for text in warning],
        plots={"memory_held": _plot(memory)},
    )


def _values() -> list[Check]:
    x = leaf(3.0)
    (x**2).backward(create_graph=True)
    dy = grad_of(x)
    first, has_graph = dy.item(), str(dy.requires_grad)
    dy.backward()
    first_afterwards = dy.item()
    x.grad = None
    y = x**2
    y.backward(retain_graph=True)
    y.backward()
    zeroed = by_backward(lambda x: grad_of(x).zero_())  # overwrites dy as well, which is the same tensor
    return [
        Check("x.grad after backward on x^2 at 3", first, 6.0),
        Check("x.grad.requires_grad", has_graph, "True"),
        Check("second backward, x.grad = None before it", by_backward(lambda x: setattr(x, "grad", None)), 2.0),
        Check("second backward, x.grad left: 6 + 2", by_backward(lambda x: None), 8.0),
        Check("the first derivative as it reads then", first_afterwards, 8.0),
        Check("second backward, x.grad.zero_() before it", zeroed, 0.0, source="observed"),
        Check("y.backward() twice: 6 + 6, no second derivative", grad_of(x).item(), 12.0),
    ]


def _lifetimes() -> list[Check]:
    checks = []
    for name, differentiate, expected in (
        ("backward(create_graph=True)", backward, "alive"),
        ("backward, then x.grad = None", backward_then_reset, "freed"),
        ("autograd.grad(create_graph=True)", autograd_grad, "freed"),
    ):
        unnamed, collected = alive_after(differentiate)
        checks.append(Check(f"x after `del x`: {name}", unnamed, expected, source="observed"))
        if expected == "alive":
            checks.append(Check(f"x after gc.collect() as well: {name}", collected, expected, source="observed"))
    return checks


def _memory(memory: dict[str, list[float]]) -> list[Check]:
    what, leaked = f"MiB held after {_TENSORS} tensors:", 2 * _TENSORS * _SIZE * 8 / 2**20  # x and x.grad, 8 bytes each
    return [
        Check(f"{what} backward", memory["backward"][-1], leaked),
        Check(f"{what} backward, then x.grad = None", memory["backward_then_reset"][-1], 0.0),
        Check(f"{what} autograd.grad", memory["autograd_grad"][-1], 0.0),
    ]


def _plot(memory: dict[str, list[float]]) -> Figure:
    figure, (axes,) = panels(1, width=7.5, height=3.6)
    for name, colour, style, width, label in (
        ("backward", VERMILION, "-", 2, "backward(create_graph=True)"),
        ("backward_then_reset", GREEN, "-", 4, "the same, then x.grad = None"),
        ("autograd_grad", BLUE, "--", 1.8, "autograd.grad(create_graph=True)"),
    ):
        axes.plot(range(1, _TENSORS + 1), memory[name], style, color=colour, linewidth=width, label=label)
    axes.set(xlabel="tensors differentiated and dropped", ylabel="still in memory [MiB]")
    axes.set_title("x and x.grad, 0.25 MiB each")
    axes.legend(frameon=False, loc="upper left")
    return figure
