"""Meta-gradients on a CUDA runtime that computes nothing: waits, captures, launches and memory."""

from __future__ import annotations

from pathlib import Path

from metalearn.algorithms import ALGORITHMS
from metalearn.metagrad import ENGINES
from tests.gpu.conftest import OnNoop

ALGORITHM_GRADIENTS = """
from metalearn.algorithms import ALGORITHMS
from metalearn.metagrad import ENGINES
from metalearn.core.module_parts import module_parts
from metalearn.models import ContextConv4
from metalearn.training.runtime.cuda_graph import capture
found = {}
for name in ALGORITHMS:
    module = (ContextConv4(3, width=8, context=4) if name == "cavia" else Conv4(3, width=8)).to(GPU)
    forward, params = functionalize(module)
    algorithm = ALGORITHMS[name](InnerLoop(lr=0.1, steps=2, second_order=name != "reptile"), module_parts(module))
    theta = algorithm.init(params)
    _, _, tasks = problem()

    def compute():
        with defer_loss_checks():
            return algorithm.meta_gradient(forward, theta, tasks, progress=0.0)

    waited = waits(compute)
    replay, result = capture(compute, GPU)
    replay()
    found[name] = waited, noop.noop_nodes() > 100, *{str(g.device) for g in result.grads.values()}
report(**found)
"""


def test_every_algorithm_waits_for_nothing_and_can_be_captured(on_noop: OnNoop) -> None:
    reported = on_noop(ALGORITHM_GRADIENTS)
    assert reported == {name: [0, True, "cuda:0"] for name in ALGORITHMS}


def test_meta_gradients_wait_for_nothing_and_can_be_captured(on_noop: OnNoop) -> None:
    """Every engine: a graph holds a meta-gradient that nothing on the host has waited for."""
    reported = on_noop("""
from metalearn.training.runtime.cuda_graph import capture
given = problem()
found = {}
for engine in ("unroll", "checkpoint", "adjoint"):
    waited = waits(lambda: gradient(given, engine=engine))
    replay, _ = capture(lambda: gradient(given, engine=engine), GPU)
    replay()
    found[engine] = waited, noop.noop_nodes() > 100
report(**found)
""")
    assert reported == {engine: [0, True] for engine in ENGINES}


def test_kernels_launch_few_operations_whatever_the_number_of_tasks(on_noop: OnNoop) -> None:
    """At most as many as a prototype had; torch's layers launch 1,032 and 3,940."""
    reported = on_noop("""
from metalearn.models.kernels import kernels_on_gpus
with kernels_on_gpus():
    found = {
        f"{ways}-way, {steps} steps": [
            launches(lambda: gradient(given, steps=steps))
            for tasks in (4, 32)
            for given in [problem(ways=ways, tasks=tasks, width=64)]
        ]
        for ways, steps in ((5, 1), (20, 5))
    }
report(**found)
""")
    for (few, many), most in zip(reported.values(), (705, 2604), strict=True):
        assert abs(many - few) <= 2, reported  # a large sum clears a counter first
        assert max(few, many) <= most, reported


def test_kernels_are_not_used_on_gpus_unless_asked_for(on_noop: OnNoop) -> None:
    reported = on_noop("""
from metalearn.models.kernels import kernels_on_gpus
given = problem()
plain = launches(lambda: gradient(given))
with kernels_on_gpus():
    kernels = launches(lambda: gradient(given))
    with kernels_on_gpus(False):
        again = launches(lambda: gradient(given))
report(plain=plain, kernels=kernels, again=again)
""")
    assert reported["plain"] == reported["again"] != reported["kernels"], reported


def test_first_peak_is_that_of_every_other(on_noop: OnNoop) -> None:
    reported = on_noop("""
from metalearn.core.profiling.memory import peak_bytes
given = problem()
report(peaks=[peak_bytes(lambda: gradient(given), GPU) for _ in range(3)])
""")
    assert len(set(reported["peaks"])) == 1, reported
    assert reported["peaks"][0] > 0


def test_tensors_of_two_devices_are_named_as_such(on_noop: OnNoop) -> None:
    reported = on_noop("""
import traceback

forward, theta, tasks = problem()
try:
    gradient((forward, theta, Episodes(*(t.cpu() for t in vars(tasks).values()))))
except RuntimeError as error:
    report(raised="".join(traceback.format_exception_only(error)), notes=getattr(error, "__notes__", []))
""")
    assert "Move the model, its parameters and the examples to one device" in reported["raised"]
    assert "one dtype" not in reported["raised"]


def test_operations_need_no_c_compiler(on_noop: OnNoop, tmp_path: Path) -> None:
    """Torch would build Triton's launcher for the outer products of a layer with one input."""
    (tmp_path / "empty").mkdir()
    reported = on_noop(
        """
from metalearn.models import MLP
from metalearn.training.experiment import resolve_device


def run():
    forward, theta = functionalize(MLP(1, 1, hidden=(8,), batch_norm=False).to(GPU))
    x, y = torch.rand(4, 5, 1, device=GPU), torch.rand(4, 5, 1, device=GPU)
    inner, mse = InnerLoop(lr=0.1, steps=1), torch.nn.functional.mse_loss
    with defer_loss_checks():
        meta_gradient(forward, theta, Episodes(x, y, x, y), inner, loss=mse)
    return ""


try:
    before = run()
except (RuntimeError, ValueError) as error:
    before = str(error)
resolve_device("cuda")
report(before=before, after=run())
""",
        PATH=str(tmp_path / "empty"),
    )
    assert "TORCH_DISABLE_NATIVE_JIT=1" in reported["before"]
    assert reported["after"] == ""
