"""Time one meta-step side by side with other libraries, on the same weights and tasks; or engines, float32, or sweeps.

Run it as ``python scripts/benchmark.py``, with ``bench.kind=engines``, ``float32`` or ``sweeps``, or for the meta-step
of any training with ``bench.setting=configured`` and that training's keys.
"""

from pathlib import Path

from metalearn.commands.benchmark.settings import check_benchmark
from metalearn.commands.cli import command
from metalearn.config.commands_schema import BenchmarkConfig
from metalearn.config.run_config import resolve_data


@command("benchmark", BenchmarkConfig, check_benchmark)
def benchmark(config: BenchmarkConfig, output_dir: Path) -> None:
    """Time one meta-step beside learn2learn, higher, TorchOpt and a hand-written loop; all must give the same gradient.

    bench.setting=configured takes the meta-step of a training's configuration instead of the published settings.
    bench.kind=engines measures memory and time of every engine against the number of inner steps, bench.kind=float32
    how far meta-gradients are from float64, bench.kind=sweeps how cost grows with inner steps, tasks, ways and width.
    """
    # Imported here, so that a refused configuration need not wait for torch.
    if config.bench.kind == "engines":
        from metalearn.commands.benchmark.engines import run_engine_table

        run_engine_table(config, output_dir)
    elif config.bench.kind == "float32":
        from metalearn.commands.benchmark.float32 import run_float32_table

        run_float32_table(resolve_data(config), output_dir)
    elif config.bench.kind == "sweeps":
        from metalearn.commands.benchmark.sweeps import run_sweeps

        run_sweeps(config, output_dir)
    else:
        from metalearn.commands.benchmark.run import run_benchmark

        run_benchmark(resolve_data(config), output_dir)


if __name__ == "__main__":
    benchmark()
