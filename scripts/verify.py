"""Check every engine on this machine: against unroll, finite differences, learn2learn, higher and TorchOpt."""

import sys

try:
    from metalearn.__main__ import start
except ModuleNotFoundError as error:
    sys.exit(f"{error} in {sys.executable}: activate the environment that has it, as with `. .venv/bin/activate`.")

if __name__ == "__main__":
    start("verify")
