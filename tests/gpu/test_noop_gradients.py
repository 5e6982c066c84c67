"""Meta-gradients on a CUDA runtime that computes nothing: waits, captures, launches and memory."""

from __future__ import annotations

from metalearn.metagrad import ENGINES
from tests.gpu.conftest import OnNoop

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
