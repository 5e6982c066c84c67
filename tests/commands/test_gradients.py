"""``metalearn gradients``: files, console output and exit code, also if a lesson is wrong or raises."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metalearn.commands import gradients
from metalearn.commands.gradients import fit_code, run_lessons
from metalearn.config.commands_schema import GradientsConfig
from metalearn.lessons import LESSONS, Check, Lesson, create_graph
from tests.commands.process import command, python
from tests.paths import REPO


def right() -> Lesson:
    figure = Figure(figsize=(5, 3))
    figure.add_subplot().plot([1, 2], [3, 4])
    checks = [Check("a [number]", 2.0, 2.0, 1e-9), Check("a word", "[word]", "[word]", source="its [source]")]
    code = f"x = [1]  #{' .' * 60} END"
    return Lesson("A right one", "It claims [this].", code, checks, ["a [note]"], {"line": figure})


def wrong() -> Lesson:
    return Lesson("A wrong one", "It claims that.", "x = 1", [Check("good", 1.0, 1.0), Check("bad", float("nan"), 1.0)])


def raising() -> Lesson:
    raise ValueError("no [such] thing")


def unrenderable() -> Lesson:
    figure = Figure(figsize=(5, 3))
    figure.text(0.5, 0.5, r"$\nosuchsymbol$")
    return Lesson("Cannot be drawn", "", "", [Check("good", 1.0, 1.0)], plots={"text": figure})


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(*functions: Callable[[], Lesson]) -> None:
        monkeypatch.setattr(gradients, "LESSONS", {function.__name__: function for function in functions})

    return use


def test_lesson_writes_plots_events_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_lessons(GradientsConfig(lesson="create_graph"), tmp_path)
    with Image.open(tmp_path / "create_graph-relu_and_tanh.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (11 * 120, round(3.4 * 120))  # inches times dots an inch
        pixels = np.asarray(picture)
    assert pixels.std() > 10, "the picture is blank"

    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "scalars": 0}).Reload()
    (image,) = events.Images("create_graph/relu_and_tanh")
    assert (image.width, image.height) == (11 * 120, round(3.4 * 120))
    assert events.Scalars("create_graph/d2y/dx2 of x^2, create_graph=True")[0].value == 2
    assert events.Scalars("create_graph/d2y/dx2 of x^2, create_graph=True (expected)")[0].value == 2
    assert "create_graph/d2y/dx2 of x^2, create_graph=False" not in events.Tags()["scalars"], "it is a word"

    report = json.loads((tmp_path / "lessons.json").read_text())
    (entry,) = report["lessons"]
    assert report["right"] is entry["right"] is True
    assert 0 < entry["seconds"] < 60
    assert entry["figures"] == ["create_graph-relu_and_tanh.png"]
    assert [check["what"] for check in entry["checks"]] == [check.name for check in create_graph.lesson().checks]
    assert entry["checks"][2] == {
        "what": "d2y/dx2 of x^2, create_graph=False",
        "computed": "RuntimeError",
        "expected": "RuntimeError",
        "tolerance": 0.0,
        "source": "observed",
        "right": True,
    }
    output = capsys.readouterr().out
    assert "(dy,) = torch.autograd.grad(y, x, create_graph=create_graph" in output
    assert "create_graph: right" in output


def test_other_lessons_are_kept_when_one_fails_or_raises(
    lessons: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lessons(raising, wrong, unrenderable, right)
    assert not run_lessons(GradientsConfig(lesson="all"), tmp_path)
    report = json.loads((tmp_path / "lessons.json").read_text())
    assert report["right"] is False
    by_name = {entry["name"]: entry for entry in report["lessons"]}
    assert list(by_name) == ["raising", "wrong", "unrenderable", "right"]
    assert by_name["raising"]["error"] == "ValueError: no [such] thing"
    assert "nosuchsymbol" in by_name["unrenderable"]["error"]
    assert [check["right"] for check in by_name["wrong"]["checks"]] == [True, False]
    assert by_name["wrong"]["checks"][1]["computed"] == "nan"
    assert [name for name, entry in by_name.items() if entry["right"]] == ["right"]
    assert (tmp_path / "right-line.png").is_file()
    output = capsys.readouterr().out
    assert "raising raised ValueError: no [such] thing" in output
    for cells in (r"raising.*0 / 0.*raised", r"wrong.*1 / 2.*WRONG", r"right.*2 / 2.*right"):
        assert re.search(cells, output), cells


def test_output_is_neither_truncated_nor_parsed_as_markup(
    lessons: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lessons(right)
    assert run_lessons(GradientsConfig(lesson="right"), tmp_path)  # type: ignore[arg-type]  # a lesson of this test
    output = capsys.readouterr().out
    for text in ("It claims [this].", "a [number]", "a [note]", "x = [1]", "END", "2 ± 1e-09", "[word] (its [source])"):
        assert text in output


def test_results_are_written_when_a_lesson_is_interrupted(lessons: Callable[..., None], tmp_path: Path) -> None:
    def interrupted() -> Lesson:
        raise KeyboardInterrupt

    lessons(right, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_lessons(GradientsConfig(lesson="all"), tmp_path)
    assert [entry["name"] for entry in json.loads((tmp_path / "lessons.json").read_text())["lessons"]] == ["right"]


def test_lessons_run_on_one_thread_and_restore_the_setting(lessons: Callable[..., None], tmp_path: Path) -> None:
    threads = []

    def record_threads() -> Lesson:
        threads.append(torch.get_num_threads())
        return right()

    lessons(record_threads)
    torch.set_num_threads(2)
    try:
        assert run_lessons(GradientsConfig(lesson="all"), tmp_path)
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)


def test_plot_file_names_are_unique() -> None:
    # File names open with the lesson's, so they can only meet if a lesson's name is the beginning of another's.
    assert not any(a != b and b.startswith(f"{a}-") for a in LESSONS for b in LESSONS)


def test_command_runs_one_lesson_and_rejects_its_folder_again(tmp_path: Path) -> None:
    run = command("gradients.py", "lesson=create_graph", cwd=tmp_path, COLUMNS="100")
    assert max(len(line) for line in run.stdout.splitlines() if str(tmp_path) not in line) <= 100
    (report,) = tmp_path.glob("outputs/lessons/*/lessons.json")
    assert {path.suffix for path in report.parent.iterdir()} >= {".json", ".png"}
    again = command("gradients.py", "lesson=create_graph", f"hydra.run.dir={report.parent}", cwd=tmp_path, code=2)
    assert "already holds a run (its lessons.json)" in again.stderr


def test_command_rejects_unknown_lesson_before_importing_torch(tmp_path: Path) -> None:
    script = str(REPO / "scripts" / "gradients.py")
    refused = python("-X", "importtime", script, "lesson=nope", cwd=tmp_path, code=2)
    assert "hydra" in refused.stderr
    assert not re.search(r"\| +torch$", refused.stderr, flags=re.MULTILINE)


def test_command_exits_with_1_when_a_check_fails(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "from metalearn.commands import gradients\n"
        "from tests.commands.test_gradients import raising, right, wrong\n"
        "gradients.LESSONS = {'maml': right, 'orders': wrong, 'graph': raising}\n"
        "sys.argv = ['gradients.py', 'hydra.run.dir=mine']\n"
        f"runpy.run_path({str(REPO / 'scripts' / 'gradients.py')!r}, run_name='__main__')\n"
    )
    run = python("-c", program, cwd=tmp_path, code=1, PYTHONPATH=str(REPO))
    assert "graph raised ValueError: no [such] thing" in run.stdout
    assert "in raising" in (tmp_path / "mine" / "gradients.log").read_text(), "where it raised is in the log"
    assert len(json.loads((tmp_path / "mine" / "lessons.json").read_text())["lessons"]) == 3


@pytest.mark.parametrize(
    ("check", "cells"),
    [
        (Check("", 479_001_600.0, 479_001_600.0), ("479,001,600", "479,001,600")),
        (Check("", 3e-16, 0.0, 1e-12), ("3e-16", "0 ± 1e-12")),
        (Check("", -0.0, 0.0, 1e-12), ("0", "0 ± 1e-12")),
        (Check("", -7.040000000000001, -7.04, 1e-12), ("-7.04", "-7.04 ± 1e-12")),
        (Check("", 1.0000000001, 1.0, 1e-12), ("1.0000000001", "1 ± 1e-12")),  # wrong, so every digit is shown
        (Check("", float("inf"), 1.0, source="by hand"), ("inf", "1 (by hand)")),
    ],
)
def test_numbers_have_relevant_digits(check: Check, cells: tuple[str, str]) -> None:
    output = gradients.format_check(check)
    assert (output[0][:12], output[1]) == (cells[0][:12], cells[1])


def test_long_lines_of_code_keep_their_indentation() -> None:
    code = "def f(a, b):\n    return a + b  # the sum of both\n    x = first + second + third"
    assert fit_code(code, 100) == code
    expected = [
        "def f(a, b):",
        "    # the sum of both",
        "    return a + b",
        "    x = first + second +",
        " " * 12 + "third",
    ]
    assert fit_code(code, 25).splitlines() == expected


def test_shown_code_uses_no_helper_that_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_lessons(GradientsConfig(lesson="backward"), tmp_path)
    output = capsys.readouterr().out
    assert all(f"def {name}(" in output for name in ("leaf", "grad_of", "break_cycle", "alive_after"))
    assert "the whole lesson: " in output
    assert "metalearn/lessons/backward.py" in output
