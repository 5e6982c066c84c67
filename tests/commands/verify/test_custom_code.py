"""``metalearn verify`` on a user's own model and update rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metalearn import Episodes, InnerLoop, MetaGradient, functionalize, meta_gradient
from metalearn.commands.verify import run as verification
from metalearn.commands.verify.cases import Case, NumericSetting, VerificationProblem, custom_cases
from metalearn.commands.verify.checks import check_verify
from metalearn.commands.verify.run import run_verification
from metalearn.core.errors import ConfigError
from metalearn.metagrad import ENGINES
from metalearn.training.state import seed_all
from tests.commands.process import words
from tests.commands.verify.factories import config_with, first_order, verify_mlp

OWN_CODE = """
import random
from dataclasses import dataclass

import numpy
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, ways, example_shape, drop=0.0, stop=False):
        super().__init__()
        self.scale = 1 + random.random() + numpy.random.rand()
        self.body, self.head = nn.Linear(example_shape.numel(), 6), nn.Linear(6, ways)
        self.drop, self.stop = drop, stop

    def forward(self, x):
        h = torch.tanh(self.body(nn.functional.dropout(x.flatten(1), self.drop)))
        return self.head(self.scale * (h - h.mean(0).detach() if self.stop else h))

class Lazy(Net):
    def forward(self, x):
        return super().forward(x)[:, :1]

@dataclass(frozen=True)
class Root:
    eps: float = 0.1

    def init(self, fast):
        return {}

    def update(self, k, grads, state):
        return {name: g / (g * g + self.eps).sqrt() for name, g in grads.items()}, state
"""
ALL_REFERENCES = {"unroll", "by hand", "adapted weights", "differences", "peer"}
OWN_MODEL, OWN_RULE = (
    ["model=custom", "model.target=own_verified:Net"],
    words("""
inner.optimizer=custom inner.optimizer_target=own_verified:Root inner.optimizer_options.eps=0.2
"""),
)


@pytest.fixture
def _own_code(code_folder: Path) -> None:
    (code_folder / "own_verified.py").write_text(OWN_CODE)


@pytest.mark.parametrize(
    ("overrides", "name", "references"),
    [
        (OWN_MODEL, "Net", ALL_REFERENCES),
        ([*OWN_MODEL, "verify.example_shape=[5]"], "Net", ALL_REFERENCES),
        ([*OWN_MODEL, "model.options.drop=0.3"], "Net", {"unroll", "adapted weights", "differences"}),
        (OWN_RULE, "mlp, Root", {"unroll", "adapted weights", "differences"}),
        ([*OWN_MODEL, *OWN_RULE], "Net, Root", {"unroll", "adapted weights", "differences"}),
    ],
    ids=["model", "shape", "dropout", "rule", "both"],
)
@pytest.mark.usefixtures("_own_code")
def test_own_code_is_one_more_case(
    overrides: list[str], name: str, references: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peer(module: torch.nn.Module, episodes: Episodes, inner: InnerLoop) -> MetaGradient:
        return meta_gradient(*functionalize(module), episodes, inner)

    monkeypatch.setattr(verification, "installed_peers", lambda peers: ({"peer": peer}, {}))
    right, report = verify_mlp(tmp_path, monkeypatch, *overrides)
    assert right
    own = [entry for entry in report["comparisons"] if entry["case"].rpartition(", ")[0].startswith(f"{name}, ")]
    assert {entry["reference"] for entry in own} == references
    assert {entry["engine"] for entry in own} == set(ENGINES)
    assert {entry["case"].split(",")[0] for entry in report["comparisons"]} == {"mlp", name.split(",")[0]}


@pytest.mark.usefixtures("_own_code")
def test_own_model_draws_the_same_numbers_each_time() -> None:
    (own,) = custom_cases(config_with(*OWN_MODEL))
    setting, scales = NumericSetting(torch.float64, torch.device("cpu"), seed=3), []
    for seed in (1, 2):
        seed_all(seed)  # of what was drawn before
        scales.append(VerificationProblem.create(Case(own, True, 1), setting).module.scale)
    assert scales[0] == scales[1]


@pytest.mark.usefixtures("_own_code")
def test_own_code_that_an_engine_differentiates_wrongly_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "PEERS", {})
    right, report = verify_mlp(tmp_path / "stop", monkeypatch, *OWN_MODEL, "model.options.stop=true")
    failed = {(entry["case"], entry["reference"]) for entry in report["comparisons"] if not entry["holds"]}
    assert failed == {("Net, second order, K=1", "differences")}, "a stopped gradient is no derivative"
    assert not right
    monkeypatch.setitem(ENGINES, "adjoint", first_order)
    _, report = verify_mlp(tmp_path / "adjoint", monkeypatch, *OWN_RULE)
    failed = {(entry["case"], entry["engine"]) for entry in report["comparisons"] if not entry["holds"]}
    assert ("mlp, Root, second order, K=1", "adjoint") in failed
    assert {engine for _, engine in failed} == {"adjoint"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.target=own_verify:Net"], r"model\.target=own_verify:Net: there is no module own_verify"),
        (
            ["model.target=own_verified:Nett"],
            r"model\.target=own_verified:Nett: own_verified has no Nett\. Did you mean",
        ),
        (["model.target=own_verified:Lazy"], r"Lazy: it returns \[2, 1\] for two .* return \[2, 3\]"),
        (["model.options.width=3"], r"model\.options=\{'width': 3\}: give model\.target=MODULE:NAME too"),
        (["inner.optimizer=custom"], r"inner\.optimizer=custom and inner\.optimizer_target=MODULE:NAME.*: give both"),
        (OWN_RULE[1:], r"inner\.optimizer=custom and inner\.optimizer_target=MODULE:NAME.*: give both"),
        (["model=conv4"], r"^model\.name=conv4: must be custom \([^\n]*$"),
    ],
)
@pytest.mark.usefixtures("_own_code")
def test_own_code_that_cannot_be_tried_is_an_error(overrides: list[str], message: str, tmp_path: Path) -> None:
    def verify() -> None:
        config = config_with(*overrides)
        check_verify(config)
        run_verification(config, tmp_path)

    with pytest.raises(ConfigError, match=message):
        verify()
    assert not (tmp_path / "verify.json").exists()
