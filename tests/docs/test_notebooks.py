"""The notebooks of docs/notebooks/ run from top to bottom, and their committed outputs are those of their sources."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from tests.paths import REPO

FOLDER = REPO / "docs" / "notebooks"
NOTEBOOKS = ["maml_in_40_lines", "memory_of_the_engines", "curvature_along_training", "adapt_a_shipped_model"]
OPTIONS = "--NotebookClient.record_timing=False --NotebookClient.coalesce_streams=True"
AGAIN = f"run it again: jupyter execute --inplace {OPTIONS} FILE"


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outline(cell: Any) -> tuple[str, int]:
    """Return the words that a cell shows, without its numbers, and how many plots."""
    texts = [output.text if "text" in output else output.data["text/plain"] for output in cell.outputs]
    words = re.sub(r"-?[0-9][0-9.,]*(e[-+]?[0-9]+)?", "0", " ".join(texts)).split()
    return " ".join(words), sum("image/png" in output.get("data", {}) for output in cell.outputs)


def execute(notebook: Any, folder: Path) -> list[Any]:
    """Run a notebook in a new kernel and an empty folder, and return its cells of code; raise what a cell raises."""
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources=where
    ).execute()
    return code_cells(notebook)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_and_shows_what_is_committed(name: str, tmp_path: Path) -> None:
    found, committed = execute(read(name), tmp_path), code_cells(read(name))
    assert [outline(cell) for cell in found] == [outline(cell) for cell in committed], AGAIN
    assert list(tmp_path.iterdir()) == [], "a notebook leaves no files behind"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_whole(name: str) -> None:
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], AGAIN
    for cell in cells:
        assert cell.outputs, f"a cell shows nothing: {cell.source[:80]}"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"a warning was kept: {output.text}"
            assert "Warning" not in str(output)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs), "a plot"
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)


def test_maml_has_40_lines() -> None:
    (source,) = [cell.source for cell in code_cells(read("maml_in_40_lines")) if "def meta_loss" in cell.source]
    assert len([line for line in source.splitlines() if line.strip()]) <= 40


PROGRESS = """
from metalearn.training.tracking.console import progress_bar

with progress_bar() as progress:
    bar = progress.add_task("meta-steps", total=3, note="loss 1.5")
    for _ in range(3):
        progress.advance(bar)
        progress.refresh()
"""


def test_progress_in_a_notebook_prints_no_warning(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(PROGRESS)]  # type: ignore[no-untyped-call]
    (cell,) = execute(nbformat.v4.new_notebook(cells=cells), tmp_path)  # type: ignore[no-untyped-call]
    assert cell.outputs
    assert "Warning" not in str(cell.outputs)  # rich shows it as an output, not on stderr
    if importlib.util.find_spec("ipywidgets") is None:
        (output,) = cell.outputs
        assert "3/3" in output.text
        assert "loss 1.5" in output.text
