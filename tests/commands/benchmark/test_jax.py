"""JAX computes our meta-gradient, with torch's number of threads, or is left out."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from torch import nn

from metalearn import InnerLoop, functionalize, meta_gradient
from metalearn.commands.benchmark.methods import BY_HAND, JAX, leave_out_unsupported
from metalearn.metagrad.baselines import by_hand
from metalearn.metagrad.baselines.common import UnsupportedSettingError, installed_peers
from metalearn.models import MLP, Conv4, ResNet12
from tests.factories import image_episodes
from tests.metagrad.settings import assert_equal

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="jax is not installed: pip install -r requirements-peers.txt"
)
BASELINES = {BY_HAND: by_hand.meta_gradient, **installed_peers({JAX: "jax"}, "metalearn.commands.benchmark")[0]}
CASES: list[tuple[nn.Module, int, bool]] = [
    (Conv4(3, width=4), 2, True),
    (Conv4(3, width=4), 1, False),
    (MLP(28 * 28, 3, hidden=(8, 4)), 2, False),
    (MLP(28 * 28, 3, hidden=(8, 4)), 0, True),
]


@pytest.mark.parametrize(
    ("module", "steps", "second_order"), CASES, ids=[f"{type(m).__name__}-{k}-{order}" for m, k, order in CASES]
)
def test_jax_equals_our_meta_gradient(module: nn.Module, steps: int, second_order: bool) -> None:
    episodes, inner = image_episodes(shots=2), InnerLoop(lr=0.1, steps=steps, second_order=second_order)
    ours = meta_gradient(*functionalize(module.double()), episodes, inner)
    assert_equal(BASELINES[JAX](module, episodes, inner), ours)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 3)),
            r"the model Sequential; here it computes Conv4, MLP",
        ),
        (MLP(28 * 28, 3, hidden=(8,)).requires_grad_(False), "frozen parameters"),
        (Conv4(3, width=4, pool="max"), r"max-pooling; XLA's fusion on CPUs computes another gradient"),
        (ResNet12(3, channels=1, widths=(3,)), "the model ResNet12; here it computes Conv4, MLP"),
    ],
)
def test_jax_is_left_out_of_what_it_does_not_compute(
    module: nn.Module, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    next(module.parameters()).requires_grad_(True)
    episodes = image_episodes(dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        assert set(leave_out_unsupported(BASELINES, module, episodes, InnerLoop(0.1, 1))) == {BY_HAND}
    assert "JAX is left out here: " in caplog.text
    assert reason in caplog.text
    with pytest.raises(UnsupportedSettingError, match=r"weight_decay=0\.1"):
        leave_out_unsupported(BASELINES, module, episodes, InnerLoop(0.1, 1, weight_decay=0.1))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_jax_has_as_many_threads_as_torch() -> None:
    expected = 3 if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 7) else None
    code = (
        "import torch; from metalearn.commands.benchmark import jax\n"
        f"torch.set_num_threads(3); assert jax.num_threads() == {expected}, jax.num_threads()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
