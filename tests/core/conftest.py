"""Every engine, and every way to take a product with the Hessian."""

from __future__ import annotations

import pytest

from metalearn.derivatives import HVP_MODES
from metalearn.metagrad import ENGINES


@pytest.fixture(params=HVP_MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)
