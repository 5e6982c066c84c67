"""Names of files and classes that a spreadsheet would evaluate."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from metalearn.commands.adapt.predictions import Predictions, write_csv

SPACES = ["", *(chr(code) for code in range(sys.maxunicode) if chr(code).isspace())]
INVISIBLE = [
    *"\0\x7f\xad\u034f\u061c\u115f\u1160\u180e\u200b\u200d\u200e\u202e\u2060\u2066\u2800\u3164\ufe0f\ufeff\uffa0"
]
SIGNS = [*"=+-@＝＋－＠﹦﹢﹣﹫⁺⁻⁼−"]  # noqa: RUF001  # the look-alikes are what is tried
FORMULAS = [f"{blank}{sign}1+1" for blank in (*SPACES, *INVISIBLE, "\xa0\t ", "\ufeff\u3000") for sign in SIGNS]
PLACES = ["{}", "photo;{};", "photo\t{}\t", "photo,{},", '"{}', 'photo"\n{}\n', "photo\r{}\r"]


def write_names(names: list[str], path: Path) -> None:
    write_csv(Predictions(names, torch.eye(len(names)), names, list(range(len(names)))), path)


@pytest.mark.fault(
    "names that a spreadsheet evaluates: every blank of Unicode, then a sign of any width, in every place of a cell",
    "no cell of `predictions.csv` is a formula, whichever of comma, semicolon and tab separates",
    cases=len(FORMULAS),
)
@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_formula_names(place: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    for first in range(0, len(FORMULAS), 50):  # a column for each
        write_names([place.format(one) for one in FORMULAS[first : first + 50]], path)
        for separator in ",;\t":
            with path.open(encoding="utf-8", newline="") as file:
                found = [cell for row in csv.reader(file, delimiter=separator) for cell in row]
            for cell in found:
                assert not cell.lstrip("".join(SPACES + INVISIBLE)).startswith(tuple(SIGNS)), (separator, cell)


def test_other_names_are_written_as_they_are(tmp_path: Path) -> None:
    names = ["a=b", "3-4", " b", "x @y", "a; b", "'=c", "(+1)", "日本", "é\n", "e\rf", "", "\xa0"]
    write_names(names, tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert [row[:4:3] for row in csv.reader(file)][1:] == [[name, name] for name in names]
