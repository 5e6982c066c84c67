"""A user's own code by its name: found, called, or refused with what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from metalearn.commands.command_line import parse_flags, requested_jobs
from metalearn.commands.compare.variants import Job
from metalearn.config.target import call_target, import_targets
from metalearn.core.errors import ConfigError
from tests.config.factories import train_config

CODE = """
NUMBER = 3

def make(width, ways=0, **more):
    return width, ways, more

def positional(inner, width=1):
    from my_sibling import VALUE
    return inner, width, VALUE

def postponed():
    def later():
        import my_other_sibling
        return my_other_sibling.VALUE
    return later

class Outer:
    class Inner:
        def __init__(self, ways):
            self.ways = ways
"""


@pytest.fixture(autouse=True)
def _code(code_folder: Path) -> None:
    (code_folder / "my_code.py").write_text(CODE)
    for sibling in ("my_sibling", "my_other_sibling"):
        (code_folder / f"{sibling}.py").write_text("VALUE = 5\n")
    (code_folder / "my_broken.py").write_text("import no_such_library\n")


def test_target_is_called_with_options_and_what_it_asks_for() -> None:
    offered = {"ways": 5, "example_shape": (1, 28, 28)}
    assert call_target("model.target", "my_code:make", {"width": 4}, **offered) == (4, 5, {})
    assert call_target("model.target", "my_code:make", {"width": 4, "ways": 2, "a": 1}, **offered) == (4, 2, {"a": 1})
    assert call_target("model.target", "my_code:positional", {}, "inner", **offered) == ("inner", 1, 5)
    assert call_target("model.target", "my_code:Outer.Inner", {}, **offered).ways == 5


def test_what_a_target_made_imports_its_neighbours_later(tmp_path: Path) -> None:
    later = call_target("model.target", "my_code:postponed", {})
    call_target("model.target", "my_code:postponed", {})
    assert later() == 5
    assert sys.path[0] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1


def test_all_targets_are_imported_or_the_one_that_is_not_there_is_named() -> None:
    import_targets({"model.target": "my_code:make", "data.target": "my_sibling:VALUE.bit_length"})
    assert {"my_code", "my_sibling"} <= set(sys.modules)
    with pytest.raises(ConfigError, match=r"algorithm\.target=my_code:mak: my_code has no mak"):
        import_targets({"model.target": "my_code:make", "algorithm.target": "my_code:mak"})


ERRORS = {
    "my_code:Nope": r"model\.target=my_code:Nope: my_code has no Nope",
    "my_code:mak": r"model\.target=my_code:mak: my_code has no mak\. Did you mean make",
    "my_code:NUMBER": r"model\.target=my_code:NUMBER: this is a int; name a class or a function",
    "my_cod:make": r"model\.target=my_cod:make: there is no module my_cod; .* working directory \(/.*PYTHONPATH",
    "my_code.inner:make": r"there is no module my_code\.inner",
    "my_code:make": r"options=\{'depth': 2\}: my_code:make cannot be called .*width'.*parameters are width, ways",
    "my_code:Outer.Inner": r"unexpected keyword argument 'depth'\); its parameters are ways",
}


@pytest.mark.parametrize(("target", "message"), ERRORS.items(), ids=list(ERRORS))
def test_error_names_the_target_and_what_to_do(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call_target("model.target", target, {"depth": 2}, ways=5)


def test_import_error_inside_the_module_is_its_own() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        call_target("model.target", "my_broken:make", {})


def test_every_target_that_is_not_there_is_named() -> None:
    targets = {"model.target": "my_code:make", "data.target": "my_cod.deep:make", "algorithm.target": "my_code:mak"}
    with pytest.raises(ConfigError, match=r"(?s)^data\.target=.* no module my_cod;.*\nalgorithm\.target=.* no mak\."):
        import_targets(targets)


@pytest.mark.parametrize(("name", "regression"), [("omniglot", "false"), ("sinusoid", "false"), ("mine", "true")])
def test_folder_is_named_by_the_kind_of_custom_data(name: str, regression: str) -> None:
    (Path.cwd() / "my_data.py").write_text(f"def {name}(): ...")
    own = ["data=custom", f"data.target=my_data:{name}", f"data.regression={regression}", "data.options={}"]
    ((_, _, folder),) = requested_jobs("train", parse_flags("train", own))
    assert folder.startswith(f"outputs/{name}-1s/" if regression == "true" else f"outputs/{name}-5w1s/")


@pytest.mark.parametrize("target", ["my_code", "my_code.make", "my_code:", ":make", "my code:make", "a:b:c", "a/b:c"])
def test_malformed_target_is_an_error(target: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.target=.*: must be MODULE:NAME, as in my_package\.nets:MyNet"):
        train_config("data=glyphs", "model=custom", f"model.target='{target}'")


@pytest.mark.parametrize(
    "options", [["model.options.width=8"], ["+model.options.width=8"], ["model.options={width: 8}"]], ids="".join
)
def test_options_are_given_one_by_one_or_together(options: list[str]) -> None:
    config = train_config("data=glyphs", "model=custom", "model.target=my_code:make", *options)
    assert vars(config.model)["options"] == {"width": 8}


def test_options_of_every_kind_are_spelt_out_for_a_launched_run() -> None:
    base = ["data=glyphs", "model=custom", "model.target=my_code:make"]
    options = "model.options={a: {b c: [1, 'x,y', null], d: true}, e: 'it''s', f: [{g: 1e-3}]}".replace("''", "\\'")
    config = train_config(*base, options)
    assert vars(config.model)["options"] == {"a": {"b c": [1, "x,y", None], "d": True}, "e": "it's", "f": [{"g": 1e-3}]}
    assert train_config(*Job("x", Path(), config).overrides) == config


@pytest.mark.parametrize("options", ["model.options=8", "model.options={1: 2}"])
def test_options_must_have_names(options: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.options=.*: must be names with values, as \{width: 32\}"):
        train_config("data=glyphs", "model=custom", "model.target=my_code:make", options)
