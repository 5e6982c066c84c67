"""Prove every engine right on this machine: against unroll, finite differences, learn2learn, higher and TorchOpt.

Run it as ``python scripts/verify.py``, or with ``run.dtype=float32`` or ``run.device=cuda``.
"""

import sys
from pathlib import Path

from metalearn.commands.cli import command
from metalearn.config.commands_schema import VerifyConfig


@command("verify", VerifyConfig)
def verify(config: VerifyConfig, output_dir: Path) -> None:
    """Prove every engine right on this machine: against unroll, finite differences, learn2learn, higher and TorchOpt.

    The exit code is 1 if a comparison exceeds its bound. All of them lie in verify.json in the output folder.
    """
    from metalearn.commands.verify.run import run_verification  # here, so that a refusal need not wait for torch

    if not run_verification(config, output_dir):
        sys.exit(1)


if __name__ == "__main__":
    verify()
