"""Time one meta-step side by side with learn2learn, on the same weights and tasks.

Run it as ``python scripts/benchmark.py``, with any key of training.
"""

from pathlib import Path

from metalearn.runs.checks import check
from metalearn.runs.config import main, settle_data
from metalearn.runs.schema import BenchmarkConfig


@main("benchmark", BenchmarkConfig, check)
def benchmark(config: BenchmarkConfig, output_dir: Path) -> None:
    """Time one meta-step side by side with learn2learn, after checking that both give the same meta-gradient."""
    settled = settle_data(config)
    from metalearn.runs.benchmark import run_benchmark  # here, so that a refused configuration need not wait for torch

    run_benchmark(settled, output_dir)


if __name__ == "__main__":
    benchmark()
