"""Code in the pages runs and prints what it says, commands compose, links lead somewhere, the README stays short."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from docs.blocks.pages import PAGES
from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from metalearn.algorithms import ALGORITHMS
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.former_keys import rename_overrides
from metalearn.config.schema import TrainConfig
from metalearn.data import omniglot
from metalearn.data.glyphs import make_glyphs
from metalearn.data.splits import ImageSplits
from tests.paths import REPO

README = REPO / "README.md"
NAMES = {page: page.relative_to(REPO).as_posix() for page in PAGES}
OWN_MODEL = (REPO / "docs" / "guides" / "own-model.md").read_text()


def printed_values(code: str) -> list[str]:
    """Return the comments beside calls of ``print``, in their order: what these lines are said to print."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)


def run_block(example: Example) -> None:
    """Run a block by itself, and compare what it prints with its comments."""
    example.namespace.clear()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        PythonEvaluator()(example)
    assert printed.getvalue().splitlines() == printed_values(example.parsed)


SYBIL = Sybil(parsers=[CodeBlockParser("python", run_block)])  # fragments are marked py
BLOCKS = {f"{NAMES[page]}, line {x.line}": x for page in PAGES for x in SYBIL.parse(page).examples()}


@pytest.mark.parametrize("place", BLOCKS)
def test_code_prints_what_it_says(place: str) -> None:
    code = BLOCKS[place].parsed
    assert printed_values(code), "a block ends with a result that a reader can check"
    assert len(code.splitlines()) <= 30
    assert all(len(line) <= 120 for line in code.splitlines())
    BLOCKS[place].evaluate()


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


OWN_CODE = [page for page in PAGES if page.name.startswith("own-") or page.name == "plain-loop.md"]


@pytest.mark.parametrize("page", OWN_CODE, ids=NAMES.get)
def test_guide_about_own_code_has_a_block_that_runs(page: Path) -> None:
    assert any(place.startswith(NAMES[page]) for place in BLOCKS)


def test_code_of_the_readme_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    glyphs = make_glyphs(classes=20)
    monkeypatch.setattr(omniglot, "load_omniglot", lambda: ImageSplits("glyphs", glyphs, glyphs, glyphs))
    names: dict[str, Any] = {}
    exec(
        next(code for code in fenced(README, "py") if "load_omniglot" in code).replace("range(7000)", "range(2)"), names
    )
    assert capsys.readouterr().out.startswith("0 1.")
    assert all(p.grad.isfinite().all() and p.grad.any() for p in names["theta"].values() if p.ndim > 1)


def test_lines_about_create_graph_are_the_meta_gradient() -> None:
    code = next(code for code in fenced(README, "py") if "create_graph=second_order" in code)
    torch.manual_seed(0)
    forward, theta = functionalize(nn.Linear(4, 3))
    x, y = torch.randn(1, 5, 4), torch.randint(3, (1, 5))
    for second_order in (True, False):
        leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
        names: dict[str, Any] = {"torch": torch, "loss": cross_entropy, "forward": forward, "theta": leaves, "lr": 0.3}
        names |= {"second_order": second_order, "support_x": x[0], "support_y": y[0], "query_x": x[0], "query_y": y[0]}
        exec(code.replace("theta.values()", "list(theta.values())"), names)
        expected = meta_gradient(forward, theta, Episodes(x, y, x, y), InnerLoop(0.3, 1, second_order=second_order))
        for found, grad in zip(names["meta_grads"], expected.grads.values(), strict=True):
            torch.testing.assert_close(found, grad)


COMMANDS = {  # without repetitions
    f"{script} {' '.join(words)}": (script, words)
    for page in PAGES
    for script, arguments in re.findall(
        r"scripts/(\w+)\.py(.*)$", "\n".join(fenced(page, "bash")).replace("\\\n", ""), re.MULTILINE
    )
    if (words := shlex.split(arguments, comments=True))
}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_composes(command: str) -> None:
    if "submitit" in command:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    script, words = COMMANDS[command]
    overrides = [o.split(",")[0] if "--multirun" in words else o for o in words if "=" in o]
    overrides = rename_overrides(script, overrides)
    launches = "hydra" in command
    config = compose(script, overrides, return_hydra_config=launches)
    if script == "train" and not launches:
        to_dataclass(config, TrainConfig)
    for key, value in (o.split("=", 1) for o in overrides):
        if "." in key and "$" not in value:  # else it chooses a group's option, or is computed
            assert OmegaConf.select(config, key) == yaml.safe_load(value), key
    if "hydra/launcher=submitit_slurm" in overrides:
        assert config.hydra.launcher._target_.endswith("SlurmLauncher")


def test_table_of_algorithms_has_every_one_with_its_paper() -> None:
    rows = re.findall(r"^\| `algorithm=(\w+)` \|.*, (\d{4}\.\d{5}) \|$", README.read_text(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(ALGORITHMS)
    for name, paper in rows:
        assert f"arXiv {paper}" in (ALGORITHMS[name].__doc__ or ""), name
        assert to_dataclass(compose("train", [f"algorithm={name}"]), TrainConfig).algorithm.name == name
    sections = re.findall(r"<!-- algorithm (\w+) -->", (REPO / "docs" / "algorithms.md").read_text())
    assert sections == list(ALGORITHMS)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 250
    assert sum("![" in line for line in lines) >= 2


class Overwriting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid().mul_(2)


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h if h.sum() > 0 else -h


def differentiate(module: nn.Module) -> None:
    x, y = torch.randn(3, 6, 4), torch.randint(2, (3, 6))
    meta_gradient(*functionalize(module), Episodes(x, y, x, y), InnerLoop(lr=0.1, steps=1))


@pytest.mark.parametrize(
    ("phrase", "module"),
    [
        ("keeps running statistics", nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))),
        ("overwrites a tensor in place", Overwriting(4, 2)),
    ],
)
def test_unsupported_model_raises_in_the_words_quoted(phrase: str, module: nn.Module) -> None:
    assert f"`{phrase}`" in OWN_MODEL
    with pytest.raises(ValueError, match=phrase):
        differentiate(module)


def test_model_that_cannot_be_batched_warns_in_the_words_quoted(caplog: pytest.LogCaptureFixture) -> None:
    assert "`cannot be batched over tasks`" in OWN_MODEL
    differentiate(Branching(4, 2))
    assert "cannot be batched over tasks by torch.vmap" in caplog.text
