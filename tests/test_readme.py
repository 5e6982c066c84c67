"""The README's code runs and prints what it says, its commands compose, and its defaults are the defaults."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from torch import Tensor, nn

from metalearn import Episodes, InnerLoop, functionalize, meta_gradient
from metalearn.algorithms import ALGORITHMS
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.schema import TrainConfig
from tests.paths import REPO

PATH = REPO / "README.md"
README = PATH.read_text()
EXTENDING = (
    *("Your own model", "Your own data", "Your own update rule", "Your own preconditioner", "Your own algorithm"),
    "In a plain loop",
)
FRAGMENTS = ("Why `create_graph=True` is what makes MAML second-order", "Adapt to your own images")


def section(title: str) -> str:
    """Return the text below a heading, up to the next one of its level or above."""
    _, text = re.split(rf"^##+ {re.escape(title)}\n", README, maxsplit=1, flags=re.MULTILINE)
    return re.split(r"^#{2,3} " if title in EXTENDING else r"^## ", text, maxsplit=1, flags=re.MULTILINE)[0]


def printed_values(code: str) -> list[str]:
    """Return the comments beside calls of ``print``, in their order: what these lines are said to print."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", code, flags=re.MULTILINE)


def run_block(example: Example) -> None:
    """Run a block by itself, and compare what it prints with its comments."""
    example.namespace.clear()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        PythonEvaluator()(example)
    assert printed.getvalue().splitlines() == printed_values(example.parsed)


DOCUMENT = Sybil(parsers=[CodeBlockParser("python", run_block)]).parse(PATH)
BLOCKS = {
    f"{re.findall(r'^##+ (.*)$', README[: example.start], flags=re.MULTILINE)[-1]}, line {example.line}": example
    for example in DOCUMENT.examples()
}


@pytest.mark.parametrize("place", [place for place in BLOCKS if not place.startswith(FRAGMENTS)])
def test_code_prints_what_it_says(place: str) -> None:
    BLOCKS[place].evaluate()
    names: dict[str, Any] = DOCUMENT.namespace
    if place.startswith(EXTENDING):
        assert printed_values(BLOCKS[place].parsed), "a block ends with a result that a reader can check"
    elif place.startswith("In your own code"):
        assert names["fast"]["0.weight"].shape == (16, 32, 10)
    else:
        assert place.startswith("Lessons on")
        derivatives, f, w, v = (names[name] for name in ("derivatives", "f", "w", "v"))
        torch.testing.assert_close(derivatives.hvp(f, w, v), torch.tensor([1.0, -1.0]))
        hessian = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        torch.testing.assert_close(derivatives.hessian(f, w), hessian, rtol=0, atol=1e-6)
        assert derivatives.top_eigenvalues(f, w, k=1).item() == pytest.approx(2)


@pytest.mark.parametrize("title", EXTENDING)
def test_section_on_extending_is_short_and_has_code(title: str) -> None:
    assert any(place.startswith(title) for place in BLOCKS)
    assert len(section(title).strip().splitlines()) <= 27
    assert all(
        len(line) <= 120 for place in BLOCKS if place.startswith(title) for line in BLOCKS[place].parsed.splitlines()
    )


COMMANDS = {  # without repetitions
    f"{script} {' '.join(words)}": (script, words)
    for script, arguments in re.findall(r"^python scripts/(\w+)\.py(.*)$", README.replace("\\\n", ""), re.MULTILINE)
    if (words := shlex.split(arguments.replace("…", "NAME"), comments=True))
}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_composes(command: str) -> None:
    if "submitit" in command:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    script, words = COMMANDS[command]
    overrides = [o.split(",")[0] if "--multirun" in words else o for o in words if "=" in o]
    launches = "hydra" in command
    config = compose(script, overrides, return_hydra_config=launches)
    if script == "train" and not launches:
        to_dataclass(config, TrainConfig)
    for key, value in (o.split("=", 1) for o in overrides):
        if "." in key and "$" not in value:  # else it chooses a group's option, or is computed
            assert OmegaConf.select(config, key) == yaml.safe_load(value), key
    if "hydra/launcher=submitit_slurm" in overrides:
        assert config.hydra.launcher._target_.endswith("SlurmLauncher")


def test_defaults_in_the_table_are_the_defaults() -> None:
    config = compose("train")
    rows = re.findall(r"^\| ((?:`[\w.]+` ?)+)\| ([^|]+) \|", section("Settings"), flags=re.MULTILINE)
    assert len(rows) > 10
    for names, defaults in rows:
        keys = re.findall(r"`([\w.]+)`", names)
        values = [value.strip().strip("`") for value in defaults.split(",")]
        for key, value in zip(keys, values, strict=True):
            default = OmegaConf.to_container(config[key.split(".")[0]])[key.split(".")[1]]  # type: ignore[index]
            assert (value if isinstance(default, str) else yaml.safe_load(value)) == default, key


def test_table_of_the_family_has_every_algorithm_with_its_paper() -> None:
    rows = re.findall(r"^\| `algorithm=(\w+)` \|.*, (\d{4}\.\d{5}) \|$", section("The family"), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(ALGORITHMS)
    for name, paper in rows:
        assert f"arXiv {paper}" in (ALGORITHMS[name].__doc__ or ""), name
        assert to_dataclass(compose("train", [f"algorithm={name}"]), TrainConfig).algorithm.name == name


def test_every_picture_exists() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 6
    for picture in pictures:
        assert (REPO / picture).is_file(), picture


class Overwriting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid().mul_(2)


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # one tensor, as functionalize wants it
        return super().forward(x)[0]


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
    assert f"`{phrase}`" in section("Your own model")
    with pytest.raises(ValueError, match=phrase):
        differentiate(module)


def test_model_that_cannot_be_batched_warns_in_the_words_quoted(caplog: pytest.LogCaptureFixture) -> None:
    assert "`cannot be batched over tasks`" in section("Your own model")
    differentiate(Recurrent(4, 2))
    assert "cannot be batched over tasks by torch.vmap" in caplog.text
