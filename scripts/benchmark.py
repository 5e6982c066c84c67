"""Time one meta-step side by side with learn2learn, on the same weights and tasks; or every engine against K.

Run it as ``python scripts/benchmark.py``, with any key of training, or with ``bench.kind=engines``.
"""

from pathlib import Path

from metalearn.runs.checks import check
from metalearn.runs.command import main
from metalearn.runs.config_files import settle_data
from metalearn.runs.schema_commands import BenchmarkConfig


@main("benchmark", BenchmarkConfig, check)
def benchmark(config: BenchmarkConfig, output_dir: Path) -> None:
    """Time one meta-step side by side with learn2learn, after checking that both give the same meta-gradient.

    bench.kind=engines measures memory and time of every engine against the number of inner steps instead, on settings
    of its own.
    """
    if config.bench.kind == "engines":
        from metalearn.runs.engine_table import run_engine_table

        run_engine_table(config, output_dir)
        return
    settled = settle_data(config)
    from metalearn.runs.benchmark import run_benchmark  # here, so that a refused configuration need not wait for torch

    run_benchmark(settled, output_dir)


if __name__ == "__main__":
    benchmark()
