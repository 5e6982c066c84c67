"""Accuracies on Omniglot as published, and the settings of which they are. Imports neither torch nor Hydra."""

from __future__ import annotations

from typing import NamedTuple

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))
"""Ways and shots of the classic table."""

PUBLISHED = (("maml", "second"), ("maml", "first"), ("maml_pp", "second"))
"""Algorithms and orders of the table."""

_ACCURACIES = {
    ("maml", "second"): ("Finn et al. 2017", (0.987, 0.999, 0.958, 0.989)),
    ("maml", "first"): ("Nichol et al. 2018", (0.983, 0.992, 0.894, 0.979)),
    ("maml_pp", "second"): ("Antoniou et al. 2019", (0.9947, 0.9993, 0.9765, 0.9933)),
}
"""By algorithm and order, in the order of ``SETTINGS``; Finn et al. give no figure of first order on Omniglot."""


class Published(NamedTuple):
    """An accuracy as a fraction, and who reports it."""

    accuracy: float
    source: str

    def __str__(self) -> str:
        return f"{round(100 * self.accuracy, 2):g}% ({self.source})"


def published(algorithm: str, order: str, ways: int, shots: int) -> Published | None:
    """The published accuracy; ``None`` where there is none.

    Example:
        >>> str(published("maml", "second", 5, 1))
        '98.7% (Finn et al. 2017)'
    """
    if (algorithm, order) not in _ACCURACIES or (ways, shots) not in SETTINGS:
        return None
    source, accuracies = _ACCURACIES[algorithm, order]
    return Published(accuracies[SETTINGS.index((ways, shots))], source)


def experiment_name(ways: int, shots: int, algorithm: str = "maml") -> str:
    """The file in ``conf/experiment/`` with the published budget."""
    return f"omniglot_{ways}way_{shots}shot" + ("" if algorithm == "maml" else f"_{algorithm}")
