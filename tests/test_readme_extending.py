"""The README's section on extending says what is true: its blocks print what they claim, its commands compose."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from metalearn.algorithms import ALGORITHMS
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from tests.conftest import REPO

HEADING = "## Extending\n"
SECTIONS = ("Your own model", "Your own data", "Your own update rule", "Your own algorithm", "In a plain loop")
LONGEST = 29


def section(heading: str) -> str:
    """A section of the README without its heading."""
    text = (REPO / "README.md").read_text().split(heading, 1)[1]
    return re.split(r"^## ", text, maxsplit=1, flags=re.MULTILINE)[0]


TEXT = section(HEADING)
_, *PARTS = re.split(r"^### ", TEXT, flags=re.MULTILINE)
BY_TITLE = {part.partition("\n")[0]: part for part in PARTS}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def claims(code: str) -> list[str]:
    """The comments beside calls of ``print``, in their order: what these lines are said to print."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT]
    return [t.string.removeprefix("#").strip() for t in comments if t.line.lstrip().startswith("print(")]


def commands(text: str) -> list[list[str]]:
    """The words of every command line, comments left out and continued lines joined."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def composed(words: list[str]) -> Any:
    """The configuration of ``python scripts/NAME.py KEY=VALUE ...``, checked as far as no data are needed."""
    python, script, *overrides = words
    assert python == "python"
    assert (REPO / script).is_file(), script
    config = compose(Path(script).stem, overrides)
    if script == "scripts/train.py":
        return to_dataclass(config, TrainConfig)
    return config


def test_the_sections_are_all_there() -> None:
    assert tuple(BY_TITLE) == SECTIONS
    assert TEXT.count("```python\n") == sum(len(blocks(part, "python")) for part in PARTS) >= len(SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_is_short(title: str) -> None:
    lines = f"### {BY_TITLE[title]}".strip().splitlines()
    assert len(lines) <= LONGEST
    assert all(len(line) <= 120 for code in blocks(BY_TITLE[title], "python") for line in code.splitlines())


@pytest.mark.parametrize("title", SECTIONS)
def test_code_prints_what_it_claims(title: str) -> None:
    found = blocks(BY_TITLE[title], "python")
    assert found
    for number, code in enumerate(found):
        claimed = claims(code)
        assert claimed, "a block ends with a result that a reader can check"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, f"{title}, block {number}", "exec"), {"__name__": "__main__"})
        assert printed.getvalue().splitlines() == claimed


class Overwriting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid().mul_(2)


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # one tensor, as functionalize wants it
        return super().forward(x)[0]


@pytest.mark.parametrize(
    ("phrase", "module"),
    [
        ("keeps running statistics", nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))),
        ("overwrites a tensor in place", Overwriting(4, 2)),
    ],
)
def test_models_are_refused_in_the_words_quoted(phrase: str, module: nn.Module) -> None:
    assert f"`{phrase}`" in BY_TITLE["Your own model"]
    x, y = torch.randn(3, 6, 4), torch.randint(2, (3, 6))
    with pytest.raises(ValueError, match=phrase):
        meta_gradient(*functionalize(module), Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1))


def test_what_cannot_be_batched_is_said_in_the_words_quoted(caplog: pytest.LogCaptureFixture) -> None:
    assert "`cannot be batched over tasks`" in BY_TITLE["Your own model"]
    x, y = torch.randn(3, 6, 4), torch.randint(2, (3, 6))
    meta_gradient(*functionalize(Recurrent(4, 2)), Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1))
    assert "cannot be batched over tasks by torch.vmap" in caplog.text


def test_command_lines_compose() -> None:
    (config,) = [composed(words) for words in commands(TEXT)]
    assert (config.data.name, config.data.root) == ("images", "PHOTOS")


def test_the_table_has_every_algorithm_with_its_paper() -> None:
    rows = re.findall(r"^\| `algorithm=(\w+)` \|.*, (\d{4}\.\d{5}) \|$", section("## The family\n"), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(ALGORITHMS)
    for name, paper in rows:
        assert f"arXiv {paper}" in (ALGORITHMS[name].__doc__ or ""), name
        assert to_dataclass(compose("train", [f"algorithm={name}"]), TrainConfig).algorithm.name == name
