"""Prove every engine right on this machine: against unroll, finite differences, learn2learn, higher and TorchOpt.

Run it as ``python scripts/verify.py``, or with ``run.dtype=float32`` or ``run.device=cuda``.
"""

from metalearn.commands.main import verify

if __name__ == "__main__":
    verify()
