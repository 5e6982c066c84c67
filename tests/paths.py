"""The path of the repository."""

from pathlib import Path

REPO = Path(__file__).parents[1]
