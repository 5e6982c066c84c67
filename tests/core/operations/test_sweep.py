"""Every operation of torch's database is right or unsupported in every mode and engine, as the table says.

The table, ``unsupported.json``, is edited by hand from the output of ``python -m tests.core.operations.database``.
"""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("expecttest", reason="torch's own tests need it: pip install expecttest")

from metalearn.core import operations
from metalearn.derivatives import inputs as hvp_inputs
from tests.core.operations import database
from tests.core.operations.database import COLUMNS
from tests.core.operations.database import operations as every_operation

TABLE = json.loads(database.UNSUPPORTED.read_text())
UNSUPPORTED: dict[str, list[str]] = TABLE["unsupported"]
_EVERY = 10
_ALWAYS = {
    *(
        "linalg.solve",
        "linalg.det",
        "linalg.cholesky",
        "cumprod",
        "nn.functional.layer_norm",
        "nn.functional.embedding",
    ),
    *("nn.functional.mse_loss", "select_scatter", "as_strided", "scatter_reduce.prod", "sinc"),
    "nn.functional.linear_cross_entropy.chunked",
}
NAMES = sorted(every_operation())
SAMPLE = sorted({*NAMES[::_EVERY], *(_ALWAYS & set(NAMES))})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_operation_is_right_or_unsupported(name: str) -> None:
    for column, verdict in COLUMNS.items():
        outcome = verdict(name)
        assert outcome in ("right", "unsupported"), f"{column}: {name} is {outcome}"
        assert outcome == "right" or name in UNSUPPORTED[column], f"{column}: {name} is not in the table"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("column", COLUMNS)
def test_table_lists_only_unsupported_operations(column: str) -> None:
    """Check that operations which are right now have left the table."""
    if not torch.__version__.startswith(TABLE["torch"].rpartition(".")[0]):
        pytest.skip(f"the table is of torch {TABLE['torch']}")
    stale = [name for name in UNSUPPORTED[column] if name in SAMPLE and COLUMNS[column](name) != "unsupported"]
    assert not stale, f"{column}: take {stale} out of {database.UNSUPPORTED.name}"


def test_database_is_complete() -> None:
    assert len(NAMES) > 450
    assert len(SAMPLE) >= 50


@pytest.mark.filterwarnings("ignore")
def test_sweep_finds_wrong_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "nn.functional.linear_cross_entropy.chunked"
    if name not in NAMES:
        pytest.skip("this torch has no linear_cross_entropy")
    monkeypatch.setattr(operations, "_CORRECTED", {})
    assert "wrong" in COLUMNS["hvp reverse_over_reverse"](name)


@pytest.mark.filterwarnings("ignore")
def test_sweep_finds_wrong_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hvp_inputs, "FORWARD_MODE", {})
    assert "wrong" in COLUMNS["hvp forward_over_reverse"]("scatter_reduce.prod")
    assert "wrong" in COLUMNS["engine adjoint"]("scatter_reduce.prod")
