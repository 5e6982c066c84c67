"""What the lessons' pictures share: colours that colour-blind readers can tell apart, and how a figure is made.

Figures are made without pyplot, which keeps every figure in a global list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#777777"
"""From the palette of Okabe & Ito 2008."""


def panels(
    columns: int, *, width: float, height: float, shares: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure, in inches, and its panels from left to right; ``shares`` of the width, ``None`` for equal ones."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=shares)
    return figure, list(np.asarray(axes).flat)
