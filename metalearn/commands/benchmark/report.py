"""The benchmark's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metalearn.commands.benchmark.contenders import order_name
from metalearn.commands.benchmark.measure import DATA, FORWARD, GRADIENT, OPTIMISER, SECOND_ORDER, BenchmarkResult
from metalearn.training.tracking.console import print_table

_HEADER = ("median ms", "quartiles", "steps/s", "speed", "peak MiB", "GFLOP/s", "% of peak")


def print_rows(title: str, rows: Sequence[BenchmarkResult], matrix_product_gflops: float, against: str) -> None:
    """A table for each order.

    Args:
        title: of the setting.
        rows: of both orders.
        matrix_product_gflops: what the last column is in percent of.
        against: whose speed is 1.
    """
    for second_order in (True, False):
        print_table(
            f"{title}: one meta-gradient, {order_name(second_order)}.\nspeed: times {against}'s (>1 is faster). "
            f"GFLOP/s: of what the gradient needs. peak: {matrix_product_gflops:.0f} GFLOP/s of torch.mm",
            ["", *_HEADER],
            [[row.who, *_cells(row)] for row in rows if row.second_order == second_order],
        )


def _cells(row: BenchmarkResult) -> list[str]:
    return [
        f"{row.median_ms:.1f}",
        "{:.1f} to {:.1f}".format(*row.quartiles_ms),
        f"{row.steps_per_s:.2f}",
        f"{row.speed:.2f}",
        f"{row.peak_mib:.1f}",
        f"{row.gflops:.1f}",
        f"{row.percent_of_peak:.1f}",
    ]


def print_shares(parts: Mapping[str, Mapping[str, float]]) -> None:
    """What a meta-step of our ``unroll`` is made of, a row for each setting's fractions."""
    names = (DATA, FORWARD, GRADIENT, SECOND_ORDER, OPTIMISER)
    print_table(
        "Where the time of a second-order meta-step goes, metalearn unroll, % of the parts' sum",
        ["", *names],
        [[title, *(f"{100 * shares[name]:.1f}" for name in names)] for title, shares in parts.items()],
    )
