"""Names of files, classes and folders that a spreadsheet or a shell would evaluate."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from metalearn.commands.adapt.predictions import Predictions, write_csv
from metalearn.commands.cli import _written
from metalearn.commands.mistakes import find_mistakes
from metalearn.commands.shell import tensorboard
from metalearn.config.commands_schema import EvaluateConfig
from metalearn.core.quoting import format_assignment, quote_command
from metalearn.training.tracking.console import print_path
from tests.commands.process import SMALL, bash, command

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


FOLDERS = [
    "plain",
    "a b",
    " a  b ",
    "a=b",
    "it's",
    'say "x"',
    "$HOME",
    "${a}",
    "\\${a}",
    "$(id)",
    "`id`",
    "(a) [b] {c}",
]
FOLDERS += [
    "a;b&c|d>e<f",
    "*?",
    "!x",
    "b\\",
    "\\'",
    "~x",
    "#x",
    "-x",
    "a,b",
    "null",
    "1e3",
    ":car:",
    "new\nline",
    "t\tb",
]
FOLDERS += ["Ä 日本", "no\xa0break", "not \udcff UTF-8", "[b]", "%s", "a b=c 'd' \"e\" $f $(g) (h) \\\n"]


@pytest.mark.fault(
    "folders whose names hold what shells and Hydra evaluate: blanks, `=`, quotes, `$`, parentheses, line breaks, …",
    "every printed command and path, pasted into bash, means that folder",
    cases=len(FOLDERS),
)
def test_printed_words_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FOLDERS:
        folder = tmp_path / name
        folder.mkdir()
        words = ["train.py", format_assignment("hydra.run.dir", folder), f"--config-dir={folder}"]
        (override,) = OverridesParser.create().parse_overrides(words[1:2])
        assert OmegaConf.create({"read": override.value()}).read == str(folder)

        (folder / "file").touch()
        print_path("Run folder", folder)
        paths = [capsys.readouterr().out.removeprefix("Run folder: "), _written(folder).partition("\n")[2]]
        lines = [f"python {quote_command(words)}", *(f"path {path}" for path in paths)]
        places = [tmp_path, folder, Path("/")]
        for place in places:
            monkeypatch.chdir(place)
            lines.append(tensorboard(folder))
        run, *shown, in_parent, inside, outside = bash("\n".join(lines), cwd=folder)
        assert run == ["python", *words]
        assert shown == [["path", str(folder)]] * 2
        for place, (program, flag, found) in zip(places, (in_parent, inside, outside), strict=True):
            assert (program, flag, place / found) == ("tensorboard", "--logdir", folder)
            assert found[0] not in "-~", "tensorboard takes these for a flag and a home"


def test_key_that_was_meant_can_be_pasted(tmp_path: Path) -> None:
    for value in ("outputs/x", "a b", "a=b", "a b='c'", "(a)"):
        (found,) = find_mistakes("evaluate", EvaluateConfig, [f"--run.dir={value}"])
        ((_, word),) = bash(f"path {found.meant}", cwd=tmp_path)
        (override,) = OverridesParser.create().parse_overrides([word])
        assert (override.key_or_group, override.value()) == ("run.dir", value)


def test_folder_that_hydra_would_evaluate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "${x}").mkdir()
    for arguments, cwd in ((["hydra.run.dir='\\${x}'"], tmp_path), ([], tmp_path / "${x}")):
        refused = command("train.py", *SMALL, *arguments, cwd=cwd, code=2)
        assert "${x}" in refused.stderr
        assert "Hydra takes ${ in a name for the name of a key; choose another folder" in refused.stderr
    assert not list((tmp_path / "${x}").iterdir())
