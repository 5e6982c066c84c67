"""Time one meta-step side by side with other libraries, on the same weights and tasks; or engines, float32, or sweeps.

Run it as ``python scripts/benchmark.py``, with ``bench.kind=engines``, ``float32`` or ``sweeps``, or for the meta-step
of any training with ``bench.setting=configured`` and that training's keys.
"""

from metalearn.commands.main import benchmark

if __name__ == "__main__":
    benchmark()
