"""Invalid configurations: every error is reported at once, with the key, its value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalearn.commands.command_line import sweep_jobs
from metalearn.commands.main import check_evaluate
from metalearn.config.commands_schema import EvaluateConfig, ReproduceConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import resolve_data
from metalearn.config.schema import TrainConfig
from metalearn.core.errors import ConfigError
from tests.config.factories import train_config, write_experiment

ERRORS = [
    ("inner.second_ordr=true", r"inner\.second_ordr=true: there is no such key\. Did you mean inner\.second_order\?"),
    ("+inner.second_ordr=true", r"inner\.second_ordr=true: there is no such key\. Did you mean inner\.second_order\?"),
    ("++inner.extra=1", r"inner\.extra=1: there is no such key\..*The keys of inner are lr, steps"),
    ("second_order=false", r"second_order=false: there is no such key\. Did you mean inner\.second_order\?"),
    ("lr=0.1", r"lr=0\.1: there is no such key\. Did you mean inner\.lr or outer\.lr\?"),
    ("width=32", r"Did you mean model\.width\?"),
    ("inner.lr= 1=2", r"Write KEY=VALUE without spaces"),
    ("hydra.run.dir=my runs/a=b", r"""quoted twice.*:\n  "hydra\.run\.dir='my runs/a=b'"$"""),
    ("hydra.run.dir=[old] a=b", r"""quoted twice.*:\n  "hydra\.run\.dir='\[old\] a=b'"$"""),
    ("hydra.run.dir=lr=${inner.lr}", r"""quoted twice.*:\n  'hydra\.run\.dir='"'"'lr=\$\{inner\.lr\}'"'"''$"""),
    ("compare.variants=[a=1,b=2]", r"Quote the texts in it, as in \"compare\.variants=\['a=1','b=2'\]\"\.$"),
    ("inner lr=0.1", r"^inner lr=0\.1: Hydra cannot read this\.\nWrite KEY=VALUE without spaces"),
    ("inner..lr=0.1", r"Write KEY=VALUE without spaces"),
    ("inner.lr==0.1", r"Write KEY=VALUE without spaces"),
    ("nope=1", r"nope=1: there is no such key\..*The keys are task, inner, outer"),
    ("inner.second_order=maybe", r"inner\.second_order=maybe: must be true or false"),
    ("inner.second_order=1", r"inner\.second_order=1: must be true or false"),
    ("inner.steps=-1", r"inner\.steps=-1: must be a whole number, at least 0"),
    ("inner.steps=many", r"inner\.steps=many: must be a whole number, at least 0"),
    ("inner.steps=1.5", r"inner\.steps=1\.5: must be a whole number"),
    ("inner.steps=1.5", r"inner\.steps=1\.5: must be a whole number"),
    ("task=[1]", r"^task=\[1\]: this cannot be composed: Cannot merge"),
    ("~data.name", r"^data\.name is required: choose with data=NAME one of omniglot, glyphs"),
    ("data.name=null", r"^data\.name=null: must be one of omniglot, glyphs"),
    ("inner.steps='3'", r"inner\.steps='3': must be a whole number"),
    ("inner.steps=true", r"inner\.steps=true: must be a whole number"),
    ("inner.steps=null", r"inner\.steps=null: must be a whole number"),
    ("inner.lr=true", r"inner\.lr=true: must be a number"),
    ("inner.engine=nope", r"inner\.engine=nope: must be one of unroll, checkpoint, adjoint"),
    ("run.threads=null", r"run\.threads=null: must be a whole number, at least 1, or auto \("),
    ("inner.task_chunk=0", r"inner\.task_chunk=0: must be a whole number, at least 1, or null"),
    ("inner.lr=0", r"inner\.lr=0: must be a number above 0"),
    ("inner.lr=nan", r"inner\.lr=nan: must be a number above 0"),
    ("inner.lr=inf", r"inner\.lr=inf: must be a number above 0"),
    ("inner.momentum=1", r"inner\.momentum=1: must be a number, at least 0 and below 1"),
    ("inner.betas=[0.9]", r"inner\.betas=\[0\.9\]: must be 2 numbers, at least 0 and below 1"),
    ("inner.betas=[0.9,1]", r"inner\.betas=\[0\.9, 1\]: must be 2 numbers, at least 0 and below 1"),
    ("outer.schedule=step", r"outer\.schedule=step: must be one of constant, cosine"),
    ("task.ways=2000", r"task\.ways=2000: at most 100, the smallest part of Omniglot's classic split"),
    ("task.ways=1", r"task\.ways=1: must be a whole number, at least 2"),
    ("task.queries=20", r"task\.shots=1 and task\.queries=20: together 21, and a class has 20 drawings"),
    ("data.split=mine", r"data\.split=mine: must be one of classic, alphabets"),
    ("model=resnet", r"model=resnet: there is no such option\. Did you mean model=resnet12\?.*conv4"),
    ("model.hidden=[3]", r"model\.hidden=\[3\]: there is no such key\. The keys of model are name, width, pool"),
    ("algorithm=mamll", r"algorithm=mamll: there is no such option\. Did you mean algorithm=maml\?"),
    ("data=images", r"data\.root is required: folder that holds one folder a class"),
    ("experiment=nope", r"experiment=nope: there is no such option\. .*omniglot_5way_1shot"),
    ("eval.queries=20", r"task\.shots=1 and eval\.queries=20: together 21, and a class has 20 drawings"),
    ("data=null", r"data=null: choose one of custom, glyphs, images, omniglot, sinusoid"),
    ("data=0", r"data=0: this cannot be composed: .*must be a string"),
    ("data=${task.ways}", r"data=\$\{task\.ways\}: this cannot be composed: "),
    ("data.name=glyphs", r"^data\.name=glyphs: choose an option as a whole, data=glyphs$"),
    ("model.name=mlp", r"^model\.name=mlp: choose an option as a whole, model=mlp$"),
    ("algorithm.name=boil", r"^algorithm\.name=boil: choose an option as a whole, algorithm=boil$"),
    ("r2", r"^r2: Hydra cannot read this\.\nWrite KEY=VALUE without spaces"),
    (
        "inner.lr=0.1,0.2",
        r"^inner\.lr=0\.1,0\.2: a list is written\n  'inner\.lr=\[0\.1,0\.2\]'\nand a text [\s\S]*--multirun runs once",
    ),
    ("outer.lr=1e38", r"^outer\.lr=1e\+38: must be a number above 0 and at most 1e\+30"),
    ("run.resume=maybe", r"run\.resume=maybe: must be one of false, true, auto"),
    ("run.resume=1", r"run\.resume=1: must be one of false, true, auto"),
    ("run.resume=null", r"run\.resume=null: must be one of false, true, auto"),
    ("run.checkpoint_every_s=-1", r"run\.checkpoint_every_s=-1: must be a number, at least 0, or null"),
    ("run.on_nonfinite=ignore", r"run\.on_nonfinite=ignore: must be one of stop, skip"),
    ("run.seed=9223372036854775808", r"run\.seed=9223372036854775808: .* at most 2\^63 - 1"),
    ("run.seed=-1", r"run\.seed=-1: must be a whole number, at least 0"),
    ("run.device=gpu", r"run\.device=gpu: must be auto, cpu, cuda or cuda:N"),
    ("run.device='cuda:'", r"run\.device=cuda:: must be auto, cpu, cuda or cuda:N"),
    ("run.device='cpu:'", r"run\.device=cpu:: must be"),
    ("run.device='cuda:01'", r"run\.device=cuda:01: must be"),
    ("run.accept=[inner.lr]", r"run\.accept=.*: this key was removed; start a new run .*run\.init_from=RUN_FOLDER"),
    ("run.memory_limit_mib=100", r"run\.memory_limit_mib=100: only inner\.engine=auto heeds it"),
    ("inner.checkpoint_every=2", r"inner\.checkpoint_every=2: inner\.engine=unroll keeps graphs and no checkpoints"),
    ("inner=3", r"inner=3: must be a section, with the keys .*second_order"),
    ("inner.steps=[", r"^inner\.steps=\[: Hydra cannot read this\.\nA text is quoted twice"),
    ("~inner", r"inner is required: a section with the keys lr, steps"),
    ("~inner.lr", r"inner\.lr is required: step size of the inner gradient descent"),
    ("~data", r"data is required: choose with data=NAME one of omniglot, glyphs"),
    ("~model", r"model is required: choose with model=NAME one of conv4, mlp"),
    ("~experiment=1", r"deletion value must be a string.*'~experiment=1'"),
    ("+experiment@_global_=[a,1]", r"\+experiment@_global_=\[a,1\]: this cannot be composed: "),
    ("run=${inner}", r"run\.lr=0\.4: there is no such key"),
    ("run=${task.ways}", r"run=5: must be a section, with the keys .*seed"),
    ("task.ways=${nope}", r"task\.ways: Interpolation key 'nope' not found"),
    ("task.ways=${task}", r"task\.ways: "),
]


@pytest.mark.parametrize(("override", "message"), ERRORS, ids=[override for override, _ in ERRORS])
def test_error_names_key_value_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_config(override)


def reported(*overrides: str) -> list[str]:
    """Return the keys that a report names, in its order."""
    with pytest.raises(ConfigError) as error:
        train_config(*overrides)
    return [line.split(":")[0] for line in str(error.value).splitlines()]


def test_report_names_every_error_of_every_section() -> None:
    overrides = ["inner.lr=abc", "inner.steps=-1", "task.shots=0", "outer.lr=-3", "run.device=gpu", "+log.evry=1"]
    sections = ["task.shots=0", "inner.lr=abc", "inner.steps=-1", "outer.lr=-3", "eval.every", "eval.queries=0"]
    sections += ["data.split is required", "model.wdith=3", "run.device=gpu", "log.evry=1"]
    assert reported(*overrides, "model.wdith=3", "~data.split", "eval.every=${nope}") == sections


def test_boolean_is_no_number_of_channels() -> None:
    assert reported("data=images", "data.root=x", "data.channels=true")[0] == "data.channels=true"


@pytest.mark.parametrize("group", ["data", "model"])
def test_group_without_an_option_is_an_error(group: str) -> None:
    for overrides in ([f"~{group}", f"{group}.name=mine"], [f"{group}={{name: mine}}"]):
        with pytest.raises(ConfigError, match=rf"{group}\.name=mine: must be one of \w+, \w+.*; choose with {group}="):
            train_config(*overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner:\n  second_ordr: true", r"second_ordr=true: .*\(in experiment/mine\.yaml\).*second_order\?"),
        ("inner:\n  second_order: maybe", r"second_order=maybe: must be true or false \(in experiment/mine\.yaml\)"),
        ("inner:\n  lr: 1\n steps: 2", r"(?s)a YAML file cannot be read: .*mine\.yaml"),
        (
            "data:\n  name: nope",
            r"data\.name=nope: must be one of omniglot, glyphs, .*torchvision, sinusoid",
        ),
    ],
)
def test_error_in_an_experiment_file_names_the_file(text: str, message: str, tmp_path: Path) -> None:
    write_experiment(tmp_path, f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        train_config("experiment=mine", config_dir=tmp_path)


def test_error_names_the_file_that_an_experiment_builds_on(tmp_path: Path) -> None:
    write_experiment(tmp_path, "# @package _global_\ndefaults: [base, _self_]\n")
    (tmp_path / "experiment" / "base.yaml").write_text("# @package _global_\ninner:\n  steps: -1\n")
    with pytest.raises(ConfigError, match=r"inner\.steps=-1: .*\(in experiment/base\.yaml\)"):
        train_config("experiment=mine", config_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"inner\.steps=-2: must be a whole number, at least 0 \(inner steps"):
        train_config("experiment=mine", "inner.steps=-2", config_dir=tmp_path)


def test_experiment_file_without_its_package_line_is_explained(tmp_path: Path) -> None:
    write_experiment(tmp_path, "inner:\n  steps: 2\n")
    with pytest.raises(ConfigError, match=r"must open with the line '# @package _global_'"):
        train_config("experiment=mine", config_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe#\x00", r"experiment=mine: this cannot be composed: 'utf-8' codec"),
        (b"# @package a b\ninner: {lr: 1}\n", r"experiment=mine: this cannot be composed: Too many components"),
        (b"# @package _global_\ndefaults:\n  - {a: b, c: d}\n", r"experiment/mine: Too many keys in default item"),
        (b"# @package _global_\nhydra: null\n", r"experiment=mine: this cannot be composed"),
        (b"# @package inner\ninner: [1]\n", r"inner\.inner=\[1\]: there is no such key"),
        (b"# @package _global_\ndefaults: [mine]\n", r"experiment=mine: this cannot be composed: .*recursion"),
        (b"false", r"experiment=mine: this cannot be composed: Invalid loaded object type: bool"),
        (b"'1'", r"experiment=mine: this cannot be composed: AssertionError"),
        (b"# @package inner\n- 1\n", r"experiment/mine'(?s:.*)Cannot merge DictConfig with ListConfig"),
        (b"# @package inner\n'': 1\n", r"there is no such key"),
        (b"# @package inner\n1: 2\n", r"inner\.1=2: there is no such key"),
    ],
)
def test_file_that_cannot_be_composed_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    write_experiment(tmp_path, content)
    with pytest.raises(ConfigError, match=message):
        train_config("experiment=mine", config_dir=tmp_path)


def test_root_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.root=/nonexistent: there is no such folder(?s:.*)Three ways out"):
        train_config("data.root=/nonexistent")


@pytest.mark.parametrize("root", ["~nobody_by_this_name/x", "x" * 300])
def test_root_that_cannot_be_read_is_named(root: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.root={root}: this folder cannot be looked into \("):
        train_config(f"data.root='{root}'")


def test_ways_are_limited_by_the_data_in_use() -> None:
    train_config("data.split=alphabets", "task.ways=160")
    with pytest.raises(ConfigError, match=r"task\.ways=161: at most 100, the smallest part of 1000 glyphs"):
        resolve_data(train_config("data.split=alphabets", "task.ways=161"))
    with pytest.raises(ConfigError, match=r"at most 5, the smallest part of 50 glyphs"):
        train_config("data=glyphs", "data.classes=50", "task.ways=6")


def test_configuration_of_another_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"bench=.*: there is no such key"):
        to_dataclass(compose("benchmark"), TrainConfig)


def test_evaluate_needs_the_folder_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"run\.dir is required: a run's folder, an exported file, or a shipped model"
    ):
        to_dataclass(compose("evaluate"), EvaluateConfig)
    with pytest.raises(ConfigError, match=r"not a run's folder, as it holds no config\.yaml"):
        check_evaluate(to_dataclass(compose("evaluate", [f"run.dir={tmp_path}"]), EvaluateConfig))


def test_keys_in_no_section_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)experiment_name is required: .*orders=\['x'\]: .*seed=1: .*seeds\?"):
        to_dataclass(compose("reproduce", ["orders=[x]", "seed=1"]), ReproduceConfig)


def test_every_job_of_a_sweep_is_expanded() -> None:
    assert sweep_jobs(["inner.steps=1,2", "run.seed=range(0,2)", "model=mlp", "inner.lr=0.5"]) == [
        [f"inner.steps={steps}", f"run.seed={seed}", "model=mlp", "inner.lr=0.5"] for steps in (1, 2) for seed in (0, 1)
    ]
    assert sweep_jobs(["inner.steps=1,2", "inner.steps=3"]) == [["inner.steps=3"]]
    for override in ("experiment=glob(*)", "inner.lr=interval(0.1,0.5)"):
        with pytest.raises(ConfigError, match=r"cannot be expanded into jobs before they start.*list the values"):
            sweep_jobs([override])
    with pytest.raises(ConfigError, match="Hydra cannot read this"):
        sweep_jobs(["inner.steps=["])


def test_whole_numbers_may_be_written_as_floats() -> None:
    config = train_config(
        "data=glyphs", "data.classes=2e2", "outer.iterations=1e3", "run.seed=5.0", "log.curvature_every=1e1"
    )
    numbers = (config.outer.iterations, config.run.seed, config.log.curvature_every)
    assert (numbers, {type(number) for number in numbers}) == ((1000, 5, 10), {int})
    with pytest.raises(ConfigError, match=r"outer\.iterations=1000\.5: must be a whole number, at least 1 \("):
        train_config("outer.iterations=1000.5")
    with pytest.raises(ConfigError, match=r"inner\.steps=true: must be a whole number"):
        train_config("inner.steps=true")
