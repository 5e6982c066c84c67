"""Time a meta-step next to other libraries, or with ``bench.kind=`` engines, float32 or sweeps."""

from metalearn.commands.main import benchmark

if __name__ == "__main__":
    benchmark()
