"""Configurations: what is refused, in which words, and that every shipped experiment composes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from metalearn import InnerLoop
from metalearn.config import schema
from metalearn.config.commands_schema import EvaluateConfig
from metalearn.config.compose import CONF, compose, group_defaults, to_dataclass
from metalearn.config.messages import help_text
from metalearn.config.overrides import sweep_jobs
from metalearn.config.run_config import load_run_config, relocate_data, resolve_data, to_yaml
from metalearn.config.schema import GlyphsConfig, OmniglotConfig, TrainConfig
from metalearn.config.validation import describe_allowed, iter_fields, validate_evaluate_config, validate_train_config
from metalearn.core.errors import ConfigError
from metalearn.data import metadata as catalog
from metalearn.data.glyphs import make_glyphs
from metalearn.metagrad import ENGINES
from metalearn.models import MLP, Conv4
from tests.paths import REPO

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OMNIGLOT_EXPERIMENTS = [name for name in EXPERIMENTS if name.startswith("omniglot") and "maml_pp" not in name]


@pytest.fixture(autouse=True)
def _no_omniglot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METALEARN_DATA", raising=False)
    monkeypatch.setattr(catalog, "_has_network", lambda: False)


def checked(*overrides: str, config_dir: Path | None = None) -> TrainConfig:
    config = to_dataclass(compose("train", list(overrides), str(config_dir) if config_dir else None), TrainConfig)
    validate_train_config(config)
    return config


REFUSED = [
    ("inner.second_ordr=true", r"inner\.second_ordr=true: there is no such key\. Did you mean inner\.second_order\?"),
    ("+inner.second_ordr=true", r"inner\.second_ordr=True: there is no such key\. Did you mean inner\.second_order\?"),
    ("++inner.extra=1", r"inner\.extra=1: there is no such key\..*The keys of inner are lr, steps"),
    ("second_order=false", r"second_order=false: there is no such key\. Did you mean inner\.second_order\?"),
    ("lr=0.1", r"lr=0\.1: there is no such key\. Did you mean inner\.lr or outer\.lr\?"),
    ("width=32", r"Did you mean model\.width\?"),
    ("inner.lr= 1=2", r"Write KEY=VALUE without spaces"),
    ("nope=1", r"nope=1: there is no such key\..*The keys are task, inner, outer"),
    ("inner.second_order=maybe", r"inner\.second_order=maybe: must be true or false"),
    ("inner.steps=-1", r"inner\.steps=-1: must be a whole number, at least 0"),
    ("inner.steps=many", r"inner\.steps=many: must be a whole number, at least 0"),
    ("inner.steps=1.5", r"inner\.steps=1\.5: must be a whole number"),
    ("inner.engine=nope", r"inner\.engine=nope: must be one of unroll, checkpoint, adjoint"),
    ("inner.task_chunk=0", r"inner\.task_chunk=0: must be a whole number, at least 1 or null"),
    ("inner.lr=0", r"inner\.lr=0\.0: must be a number above 0"),
    ("inner.lr=nan", r"inner\.lr=nan: must be a number above 0"),
    ("inner.lr=inf", r"inner\.lr=inf: must be a number above 0"),
    ("outer.schedule=step", r"outer\.schedule=step: must be one of constant, cosine"),
    ("task.ways=2000", r"task\.ways=2000: at most 100, the smallest part of Omniglot's classic split"),
    ("task.ways=1", r"task\.ways=1: must be a whole number, at least 2"),
    ("task.queries=20", r"task\.shots=1 and task\.queries=20: together 21, and a class has 20 drawings"),
    ("data.split=mine", r"data\.split=mine: must be one of classic, alphabets"),
    ("model=resnet", r"Could not find 'model/resnet'(?s:.*)conv4"),
    ("model.hidden=[3]", r"model\.hidden=\[3\]: there is no such key\. The keys of model are name, width, pool"),
    ("algorithm=mamll", r"Could not find 'algorithm/mamll'(?s:.*)Did you mean algorithm=maml\?"),
    ("data=images", r"data\.root is required: folder that holds one folder a class"),
    ("experiment=nope", r"Could not find 'experiment/nope'(?s:.*)omniglot_5way_1shot"),
    ("eval.queries=20", r"task\.shots=1 and eval\.queries=20: together 21, and a class has 20 drawings"),
    ("data=null", r"data=null: choose one of glyphs, images, omniglot, sinusoid"),
    ("~data", r"data\.name is required"),
    ("~model", r"model\.name is required"),
    ("data.name=glyphs", r"data\.name=glyphs: must be omniglot"),
    ("model.name=mlp", r"model\.name=mlp: must be conv4"),
    ("run.seed=9223372036854775808", r"run\.seed=9223372036854775808: .* at most 9223372036854775807"),
    ("run.seed=-1", r"run\.seed=-1: must be a whole number, at least 0"),
    ("run.device=gpu", r"run\.device=gpu: must be auto, cpu, cuda or cuda:N"),
    ("run.device='cuda:'", r"run\.device=cuda:: must be auto, cpu, cuda or cuda:N"),
    ("run.device='cpu:'", r"run\.device=cpu:: must be"),
    ("run.device='cuda:01'", r"run\.device=cuda:01: must be"),
    ("inner=3", r"inner=3"),
    ("inner.steps=[", r"no viable alternative at input '\['"),
    ("~inner.lr", r"inner\.lr.*does not support deletion"),
    ("task.ways=${nope}", r"nope"),
    ("run.memory_limit=100", r"run\.memory_limit=100: only inner\.engine=auto heeds it"),
    ("inner.snapshot_every=2", r"inner\.snapshot_every=2: inner\.engine=unroll keeps graphs and no snapshots"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=[override for override, _ in REFUSED])
def test_refused_with_key_value_and_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(override)


def test_every_fault_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        checked("inner.steps=-1", "task.shots=0", "outer.lr=-3", "run.device=gpu")
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "task.shots=0",
        "inner.steps=-1",
        "outer.lr=-3.0",
        "eval.queries=0",
        "run.device=gpu",
    ]


@pytest.mark.parametrize("group", ["data", "model"])
def test_a_group_without_an_option_is_refused(group: str) -> None:
    with pytest.raises(ConfigError, match=rf"{group}: nothing is chosen; take {group}=\w+ or {group}=\w+"):
        checked(f"~{group}", f"{group}.name=mine")


def test_every_job_of_a_sweep_is_seen() -> None:
    assert sweep_jobs(["inner.steps=1,2", "run.seed=range(0,2)", "model=mlp", "inner.lr=0.5"]) == [
        [f"inner.steps={steps}", f"run.seed={seed}", "model=mlp", "inner.lr=0.5"] for steps in (1, 2) for seed in (0, 1)
    ]
    assert sweep_jobs(["inner.steps=1,2", "inner.steps=3"]) == [["inner.steps=3"]]
    for for_others in ("experiment=glob(*)", "inner.lr=interval(0.1,0.5)"):
        with pytest.raises(ConfigError, match=r"cannot be expanded into jobs before they start.*list the values"):
            sweep_jobs([for_others])
    with pytest.raises(ConfigError, match="no viable alternative"):
        sweep_jobs(["inner.steps=["])


def test_data_of_a_finished_run_is_found_where_it_lies_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def root(recorded: str | None, given: str | None) -> str | None:
        omniglot = checked().data
        assert isinstance(omniglot, OmniglotConfig)
        data = relocate_data(dataclasses.replace(omniglot, root=recorded), given)
        assert isinstance(data, OmniglotConfig)
        assert data.fallback is None, "a test on other data is no test"
        return data.root

    here, gone = str(tmp_path), str(tmp_path / "gone")
    assert root(here, None) == here
    assert root(gone, here) == here
    assert root(None, None) is None
    assert root(gone, None) == gone
    monkeypatch.setenv("METALEARN_DATA", "/elsewhere")
    assert root(gone, None) == "/elsewhere"
    assert root(here, None) == here
    glyphs_data = checked("data=glyphs").data
    assert relocate_data(glyphs_data, None) == glyphs_data
    with pytest.raises(ConfigError, match="trained on glyphs, which is embedded"):
        relocate_data(glyphs_data, here)


def test_a_folder_with_a_comma_can_hold_experiments(tmp_path: Path) -> None:
    folder = tmp_path / "my, own"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\ninner:\n  steps: 7\n")
    assert checked("experiment=mine", config_dir=folder).inner.steps == 7


def test_a_configuration_without_the_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks its schema, TrainConfig"):
        to_dataclass(compose("settings"), TrainConfig)


def test_typo_in_an_experiment_file_names_file_key_and_value(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ninner:\n  second_ordr: true\n")
    with pytest.raises(ConfigError, match=r"inner\.second_ordr=True: .*\(in experiment/mine\.yaml\).*second_order\?"):
        checked("experiment=mine", config_dir=tmp_path)


def test_wrong_type_in_an_experiment_file_names_file_key_and_value(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ninner:\n  second_order: maybe\n")
    with pytest.raises(ConfigError, match=r"second_order=maybe: must be true or false \(in experiment/mine\.yaml\)"):
        checked("experiment=mine", config_dir=tmp_path)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ninner:\n  lr: 1\n steps: 2\n")
    with pytest.raises(ConfigError, match=r"(?s)a YAML file cannot be read: .*mine\.yaml"):
        checked("experiment=mine", config_dir=tmp_path)


def test_experiment_file_without_its_package_line_is_explained(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("inner:\n  steps: 2\n")
    with pytest.raises(ConfigError, match=r"must open with the line '# @package _global_'"):
        checked("experiment=mine", config_dir=tmp_path)


def test_missing_omniglot_without_fallback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root=/nonexistent: there is no such folder(?s:.*)Three ways out"):
        checked("data.root=/nonexistent", "data.fallback=null")
    checked("data.root=/nonexistent")


def test_ways_are_limited_by_the_data_in_use() -> None:
    checked("data.split=alphabets", "task.ways=160")
    with pytest.raises(ConfigError, match=r"task\.ways=161: at most 100, the smallest part of 1000 glyphs"):
        resolve_data(checked("data.split=alphabets", "task.ways=161"))
    with pytest.raises(ConfigError, match=r"at most 5, the smallest part of 50 glyphs"):
        checked("data=glyphs", "data.classes=50", "task.ways=6")


def test_settled_data_is_glyphs_with_their_defaults_where_omniglot_is_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    settled = resolve_data(checked())
    assert settled.data == checked("data=glyphs").data
    assert re.search(r"NO OMNIGLOT: .* holds no Omniglot, and it cannot be downloaded", caplog.text)


def test_settled_root_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "omniglot-py" / "images_background").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = resolve_data(checked("data.root=.")).data
    assert isinstance(data, OmniglotConfig)
    assert data.root == str(tmp_path)


def test_metalearn_data_is_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALEARN_DATA", "/somewhere")
    data = checked().data
    assert isinstance(data, OmniglotConfig)
    assert data.root == "/somewhere"


@pytest.mark.parametrize("name", [name for name in OMNIGLOT_EXPERIMENTS if not name.endswith("_cpu")])
def test_experiments_have_finns_hyperparameters(name: str) -> None:
    config = checked(f"experiment={name}")
    ways, shots = (int(n) for n in re.findall(r"\d+", name))
    assert (config.task.ways, config.task.shots, config.task.queries, config.eval.queries) == (
        ways,
        shots,
        shots,
        shots,
    )
    expected = (0.4, 1, 32) if ways == 5 else (0.1, 5, 16)
    assert (config.inner.lr, config.inner.steps, config.task.meta_batch) == expected
    assert config.inner.eval_steps > config.inner.steps
    assert (config.outer.lr, config.outer.iterations, config.outer.schedule) == (1e-3, 60_000, "constant")


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.endswith("_cpu")])
def test_experiments_for_a_cpu_differ_in_the_training_budget_alone(name: str) -> None:
    published, cheap = (dict(leaves(checked(f"experiment={which}"))) for which in (name.removesuffix("_cpu"), name))
    budget = {"task.queries", "task.meta_batch", "outer.lr", "outer.iterations", "outer.schedule"}
    assert {key for key in published if published[key] != cheap[key]} <= budget
    assert cheap["outer.iterations"] * cheap["task.meta_batch"] < 120_001
    assert cheap["outer.schedule"] == "cosine"


def leaves(config: TrainConfig) -> list[tuple[str, Any]]:
    return [(name, value) for name, value, _, _ in iter_fields(config)]


def test_the_four_classic_settings_are_there() -> None:
    names = {f"omniglot_{n}way_{k}shot" for n in (5, 20) for k in (1, 5)}
    assert names | {f"{name}_cpu" for name in names} <= set(EXPERIMENTS)


def test_a_saved_configuration_comes_back(tmp_path: Path) -> None:
    for overrides in (["data=glyphs", "model=mlp", "model.hidden=[4,4]"], ["inner.task_chunk=3"]):
        config = checked(*overrides)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_run_config(tmp_path / "config.yaml") == config


def test_a_run_of_before_the_engines_comes_back_with_the_defaults() -> None:
    older = REPO / "outputs" / "reference" / "omniglot-5w1s" / "maml-second_order-seed0" / "config.yaml"
    assert "snapshot_every" not in older.read_text()
    config = load_run_config(older)
    assert (config.inner.snapshot_every, config.run.precision, config.log.curvature_every) == (1, "float32", None)
    assert config.inner.lr == 0.4


@pytest.mark.parametrize("text", ["", "a: 1", "- 1", "data: {name: nope}", "{"])
def test_a_file_that_is_no_configuration_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is not the configuration of a run"):
        load_run_config(tmp_path / "config.yaml")


def test_evaluate_needs_a_runs_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir is required"):
        to_dataclass(compose("evaluate"), EvaluateConfig)
    with pytest.raises(ConfigError, match=r"not a run's folder, as it holds no config\.yaml"):
        validate_evaluate_config(to_dataclass(compose("evaluate", [f"run.dir={tmp_path}"]), EvaluateConfig))


@pytest.mark.parametrize("groups", [[], ["data=glyphs", "model=mlp"]])
def test_help_explains_every_key(groups: list[str]) -> None:
    config = compose("train")
    text = re.sub(r"\s+", " ", help_text(config, "scripts/train.py", "Trains.", group_defaults("train", config)))
    for name, _, f, kind in iter_fields(checked(*groups)):
        pattern = rf" {re.escape(name)}=\S+ (\[[\d., ]+\] |[\d., ]+\] )?{re.escape(f.metadata['meaning'])} "
        assert re.search(pattern + re.escape(f"({describe_allowed(f, kind)})"), text), name


def defaults_of(function: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


def test_yaml_and_signatures_agree_on_defaults() -> None:
    # A default lives in the YAML for runs and in the signature for the library; the two are one.
    inner, library = checked().inner, defaults_of(InnerLoop)
    for name in ("second_order", "engine", "task_chunk", "snapshot_every"):
        assert getattr(inner, name) == library[name]
    data = checked("data=glyphs").data
    assert isinstance(data, GlyphsConfig)
    assert (data.jitter, data.seed) == (defaults_of(make_glyphs)["jitter"], defaults_of(make_glyphs)["seed"])
    conv4, mlp = dataclasses.asdict(checked().model), dataclasses.asdict(checked("model=mlp").model)
    assert (conv4["width"], conv4["pool"]) == (defaults_of(Conv4)["width"], defaults_of(Conv4)["pool"])
    assert (tuple(mlp["hidden"]), mlp["batch_norm"]) == (defaults_of(MLP)["hidden"], defaults_of(MLP)["batch_norm"])


def test_schema_and_engines_agree() -> None:
    assert tuple(ENGINES) == schema.ENGINES


def test_no_default_hides_in_the_schema() -> None:
    for _, kind in get_type_hints(TrainConfig).items():
        for f in dataclasses.fields(kind):
            assert f.default == "???", f"{kind.__name__}.{f.name}"
