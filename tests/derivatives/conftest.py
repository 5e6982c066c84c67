"""Every way to take a product with the Hessian."""

from __future__ import annotations

import pytest

from metalearn.derivatives import HVP_MODES


@pytest.fixture(params=HVP_MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)
