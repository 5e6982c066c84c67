"""Check every engine on this machine: against unroll, finite differences, learn2learn, higher and TorchOpt."""

from metalearn.commands.main import verify

if __name__ == "__main__":
    verify()
