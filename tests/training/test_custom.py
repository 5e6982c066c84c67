"""A user's own model, data, update rule and algorithm: trained, resumed, loaded; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metalearn.core.errors import ConfigError, DataError, RunError
from metalearn.data.sinusoid import SinusoidSampler
from metalearn.inference.loading import load
from metalearn.training.experiment import build_experiment, build_samplers
from tests.config.factories import train_config
from tests.faults.runs import metrics_without_times
from tests.training.run_folders import run, run_interrupted

CODE = (Path(__file__).parent / "own_code.py").read_text()
FEW = ["outer.iterations=2", "eval.every=1", "eval.validation_episodes=4", "eval.episodes=4", "task.meta_batch=4"]
GLYPHS, TINY = ["data=glyphs", "data.classes=50", "model=mlp", "model.hidden=[8]"], ["model=mlp", "model.hidden=[8]"]
MODEL = ["data=glyphs", "data.classes=50", "model=custom", "model.target=own_code:Net", "model.options.width=4"]
IMAGES = [*TINY, "data=custom", "data.target=own_code:images", "data.options={size: 8}"]
NUMBERS = ["data=custom", "data.target=own_code:Points", "data.regression=true", "task.shots=4"]
POINTS = [*TINY, "model.batch_norm=false", *NUMBERS]
RULE = [*GLYPHS, "inner.optimizer=custom", "inner.optimizer_target=own_code:AdaGrad", "inner.optimizer_options.eps=0.1"]
ALGORITHM = [*GLYPHS, "algorithm=custom", "algorithm.target=own_code:anil_lslr"]
DRAWN = ["data=custom", "data.target=own_code:drawn", "data.options={size: 8}"]
DRAWING = [*DRAWN, "model=custom", "model.target=own_code:Dropping"]


@pytest.fixture(autouse=True)
def _code(code_folder: Path) -> None:
    (code_folder / "own_code.py").write_text(CODE)


@pytest.mark.parametrize(
    "overrides",
    [MODEL, IMAGES, POINTS, RULE, ALGORITHM, DRAWING],
    ids=["model", "images", "points", "rule", "alg", "drawing"],
)
def test_own_code_is_trained_resumed_and_loaded(overrides: list[str], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *FEW, *overrides)
    run_interrupted(tmp_path / "cut", 1, *FEW, *overrides)
    run(tmp_path / "cut", *FEW, *overrides, "run.resume=true")
    assert metrics_without_times(tmp_path / "cut") == metrics_without_times(tmp_path / "whole")
    expected = {"dataset": "glyphs", "algorithm": "maml"}
    expected |= {"dataset": "images"} if overrides is IMAGES else {"dataset": "Points"} if overrides is POINTS else {}
    expected |= {"dataset": "drawn"} if overrides is DRAWING else {}
    expected |= {"algorithm": "anil_lslr"} if overrides is ALGORITHM else {}
    assert {name: whole[name] for name in expected} == expected

    with pytest.raises(ConfigError, match=r"own_code:\w+[.,] .*give metalearn\.load\(run, trust_code=True\)"):
        load(tmp_path / "whole")
    learner = load(tmp_path / "whole", trust_code=True)
    episode = build_experiment(train_config(*FEW, *overrides)).test.tasks(0, 1)
    learner.adapt(episode.support_x[0], episode.support_y[0])
    predicted = torch.tensor(learner.predict(episode.query_x[0]))
    assert predicted.shape == episode.query_y[0].shape


@pytest.mark.parametrize("mode", ["task", "frozen"])
def test_running_statistics_of_an_own_model_are_those_that_the_key_names(mode: str, tmp_path: Path) -> None:
    own = ["data=glyphs", "data.classes=50", "model=custom", "model.target=own_code:Running"]
    with pytest.raises(
        ConfigError, match=r"running statistics.*: model\.batch_norm=task, .* or model\.batch_norm=frozen"
    ):
        build_experiment(train_config(*FEW, *own))
    run(tmp_path / "run", *FEW, *own, f"model.batch_norm={mode}")
    learner = load(tmp_path / "run", trust_code=True)
    episode = build_experiment(train_config(*FEW, *own, f"model.batch_norm={mode}")).test.tasks(0, 1)
    learner.adapt(episode.support_x[0], episode.support_y[0])
    first, second = (learner.predict_proba(episode.query_x[0][:n], transductive=True)[:2] for n in (2, 9))
    depends_on_the_others = not np.allclose(first, second, atol=1e-6)
    assert depends_on_the_others == (mode == "task")


def test_resume_with_another_target_is_an_error(tmp_path: Path) -> None:
    rule, algorithm = (
        [o for o in overrides if o.startswith(("inner", "algorithm"))] for overrides in (RULE, ALGORITHM)
    )
    own = [*MODEL, *rule, *algorithm, "algorithm.options.learned=parameter"]
    run(tmp_path / "run", *FEW, *own)
    for change, line in (
        ("model.target=own_code:Wide", "model.target: own_code:Net in the folder, own_code:Wide now"),
        ("model.options.width=5", "model.options.width: 4 in the folder, 5 now"),
        ("inner.optimizer_target=metalearn:SGD", "inner.optimizer_target: own_code:AdaGrad in the folder, metal"),
        ("inner.optimizer_options.eps=1", "inner.optimizer_options.eps: 0.1 in the folder, 1 now"),
        ("algorithm.target=own_code:text", "algorithm.target: own_code:anil_lslr in the folder, own_code:text now"),
        ("algorithm.options.learned=layer", "algorithm.options.learned: parameter in the folder, layer now"),
    ):
        with pytest.raises(RunError, match=line):
            run(tmp_path / "run", *FEW, *own, change, "run.resume=true")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.target=own_code:Nett", "model.target=own_code:Nett: own_code has no Nett. Did you mean Net"),
        ("inner.optimizer_target=own_code:AdaGra", "own_code has no AdaGra. Did you mean AdaGrad"),
        ("algorithm.target=own_code:anil", "own_code has no anil. Did you mean anil_lslr"),
    ],
)
def test_targets_are_imported_before_data_are_read(change: str, message: str, tmp_path: Path) -> None:
    rule, algorithm = ([o for o in overrides if o.startswith(("inner", "alg"))] for overrides in (RULE, ALGORITHM))
    own = [*MODEL[2:], *rule, *algorithm, "data=custom", "data.target=own_code:explode"]
    with pytest.raises(ConfigError, match=message):
        build_experiment(train_config(*FEW, *own, change))
    with pytest.raises(AssertionError, match="minutes"):
        build_experiment(train_config(*FEW, *own))


def test_own_code_that_draws_or_seeds_leaves_the_run_as_it_is() -> None:
    def state_after(seed: int, *overrides: str) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)  # of what is drawn before
        experiment = build_experiment(train_config(*FEW, *overrides))
        experiment.train.batch(3, 4)
        return experiment.theta, torch.get_rng_state()

    for quiet, loud in (
        (POINTS, [*POINTS, "data.target=own_code:Seeding"]),
        (RULE, [*RULE, "inner.optimizer_target=own_code:DrawingAdaGrad"]),
        ([*ALGORITHM, "algorithm.options={}"], [*ALGORITHM, "algorithm.target=own_code:anil_drawing"]),
        ([*TINY, *DRAWN], [*TINY, *DRAWN]),
    ):
        (theta, state), (other_theta, other_state) = state_after(101, *quiet), state_after(102, *loud)
        assert torch.equal(state, other_state), loud
        assert all(torch.equal(theta[name], other_theta[name]) for name in theta), loud
    tasks = []
    for seed in (101, 102):
        torch.manual_seed(seed)
        tasks.append(build_experiment(train_config(*FEW, *TINY, *DRAWN)).train.tasks(0, 3).query_x)
    assert torch.equal(*tasks)


def test_loaded_model_draws_what_the_trained_one_did(tmp_path: Path) -> None:
    run(tmp_path / "run", *FEW, *DRAWING)
    experiment = build_experiment(train_config(*FEW, *DRAWING))
    torch.manual_seed(77)
    before = torch.get_rng_state()
    learner = load(tmp_path / "run", trust_code=True)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers go on"
    outputs = []
    for forward in (experiment.forward, learner.forward):
        torch.manual_seed(0)  # of dropout
        outputs.append(forward(experiment.theta, torch.ones(2, 1, 8, 8)))
    assert torch.equal(*outputs)


def examples(*overrides: str) -> Tensor:
    config = train_config(*FEW, *IMAGES, *overrides)
    return build_samplers(config, torch.device("cpu"))[0].tasks(0, 2).query_x


def test_examples_by_class_may_be_bytes_or_numbers_in_tensors_or_lists() -> None:
    bytes_ = examples()
    assert bytes_.shape == (2, 15, 1, 8, 8)
    assert 0.9 < bytes_.max() <= 1
    assert examples("data.options.sparse=true").shape == bytes_.shape
    import own_code  # type: ignore[import-not-found]

    made = own_code.images(8, dtype=torch.float64)
    for form in (lambda x: x / 255, lambda x: (x / 255).numpy(), lambda x: [np.asarray(each / 255) for each in x]):
        own_code.images = lambda size, form=form: {split: form(x) for split, x in made.items()}
        torch.testing.assert_close(examples(), bytes_)


def test_sampler_class_of_the_library_is_a_data_set() -> None:
    target = "data.target=metalearn.data.sinusoid:SinusoidSampler"
    config = train_config(*FEW, *TINY, "data=custom", target, "data.regression=true")
    task = config.task
    sampler = build_samplers(config, torch.device("cpu"))[1]
    expected = SinusoidSampler(task.shots, config.eval.queries, 0, "validation")
    assert torch.equal(sampler.batch(1, 3).query_y, expected.batch(1, 3).query_y)


def data(name: str, *more: str) -> list[str]:
    return [*TINY, "data=custom", f"data.target=own_code:{name}", *more]


ERRORS: dict[str, tuple[list[str], str]] = {
    "no module": ([*MODEL, "model.target=own_code:text"], r"own_code:text: this made a str; it must be an nn\.Module"),
    "output": (
        [*MODEL, "model.target=own_code:Wide"],
        r"Wide: it returns \[2, 3\] for two .* return \[2, 5\]",
    ),
    "input": (
        [*MODEL, "model.target=own_code:Deep"],
        r"Deep: it cannot take two examples, \[2, 1, 28, 28\] \(.*, \S+own_code\.py line \d+\)$",
    ),
    "running statistics": (
        [*MODEL, "model.target=own_code:Normalised"],
        r"^model\.target=own_code:Normalised: functionalize: layer 'norm' \(BatchNorm1d\) keeps running statistics",
    ),
    "options": ([*MODEL, "model.options.deep=3"], r"options=\{'width': 4, 'deep': 3\}: own_code:Net cannot be called"),
    "algorithm": (
        [*ALGORITHM, "algorithm.target=own_code:text"],
        r"made a str; it must be a metalearn\.Algorithm",
    ),
    "algorithm's parameters": (
        [*ALGORITHM, "algorithm.options.lr=3"],
        r"algorithm\.options=\{'lr': 3\}: .*its parameters are inner, parts, learned",
    ),
    "rule": (
        [*RULE, "inner.optimizer_target=own_code:text"],
        r"made a str without a method init; it must be",
    ),
    "no mapping": (data("text"), r"data\.target=own_code:text: this made <class 'str'>; it must be a mapping with the"),
    "differs": (data("Restless"), r"Restless, train: tasks\(0, 2\) differ from one call to the next"),
    "labels": (data("Labelled"), r"Labelled, train: labels are torch\.int64 \[2, 5\] from 1 to 5; .* from 0 to 4"),
    "number": (data("Short"), r"Short, train: tasks\(0, 2\) returned 1 task; it must be 2"),
    "targets": (data("Points"), r"Points, train: labels are torch\.float32 .*data\.regression=true"),
    "no targets": (
        [*IMAGES, "data.regression=true"],
        r"images, train: targets are torch\.int64 \[2, 5\]; with",
    ),
    "ways": ([*IMAGES, "task.ways=6"], r"own_code:images, validation: .*6 ways, but split 'validation' has only 5"),
    "ragged": (
        data("given", "data.options.train=[[[1.0, 2.0], [3.0]], [[1.0, 2.0]]]"),
        r"given, train: class 0 is a list, \[\[1\.0, 2\.0\], \[3\.0\]\]; it must be a tensor or an array of numbers",
    ),
    "strings": (data("given", "data.options.train=[[a, b]]"), r"train: class 0 is a list, \['a', 'b'\]; it must be a"),
    "none": (
        data("given", "data.options.train=null"),
        r"given, train: a split is a NoneType, None; it must be a tensor",
    ),
    "text": (data("given", "data.options.train=photos"), r"given, train: a split is a str, 'photos'; it must be a"),
    "names": (data("given", "data.options.train={a: 1}"), r"given, train: a split is a dict, \{'a': 1\}; it must be"),
    "numbers": (data("given", "data.options.train=[1, 2]"), r"given, train: class 0 is a int, 1; it must be"),
    "no classes": (
        data("given", "data.options.train=[]"),
        r"train: it is an empty list; give the examples of each class",
    ),
    "whole": (
        data("given", "data.options.train=[[[1, 2]]]"),
        r"uint8 or floating point .* got torch\.int64 .*; convert",
    ),
    "shapes": (
        data("shapes"),
        r"train: an example of class 2 is torch\.float32 \[3\], and one of class 0 torch\.float32 \[2\]; make them",
    ),
    "kinds": (data("kinds"), r"an example of class 1 is torch\.uint8 \[2\], and one of class 0 torch\.float32 \[2\]"),
    "wider": (data("wider"), r"wider: examples are \[3\] in train, \[2\] in validation, \[2\] in test; make them all"),
    "few": (
        data("few"),
        r"few, train: class 0 has 3 examples, and a task takes 4 of a class \(task\.shots=1, task\.queries=3\); lower",
    ),
    "few in one": (
        data("few", "data.options.which=list"),
        r"few, train: class 4 has 3 examples, and a task takes 4 of",
    ),
    "few to test": (
        [*IMAGES, "eval.queries=6"],
        r"images, validation: class 0 has 6 examples, and .* 7 of a class \(task\.shots=1, eval\.queries=6\)",
    ),
    "NaN": (data("nan"), r"nan, train: class 3 holds NaN or infinity; remove"),
    "NaN in a list": (data("nan", "data.options.which=list"), r"nan, train: class 3 holds NaN or infinity; remove"),
    "infinity": ([*POINTS, "data.target=own_code:Broken"], r"Broken, train: query_x of tasks\(0, 2\) holds NaN or inf"),
    "unlike": ([*POINTS, "data.target=own_code:Unlike"], r"support is torch\.float32 \[2, 4, 3\] and query .*alone"),
    "model": ([*NUMBERS, "model=conv4"], r"model=conv4: it cannot take two examples, \[2, 3\] \("),
}


@pytest.mark.parametrize(("overrides", "message"), ERRORS.values(), ids=list(ERRORS))
def test_error_names_the_target_why_and_what_to_do(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_experiment(train_config(*FEW, *overrides))


def test_folder_needs_examples_that_are_images(tmp_path: Path) -> None:
    run(tmp_path / "run", *FEW, *POINTS)
    with pytest.raises(DataError, match="predicts numbers"):
        load(tmp_path / "run", trust_code=True).read(tmp_path)
