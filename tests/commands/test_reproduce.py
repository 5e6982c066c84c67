"""A reproduced row: checks, results, where they are written, and a training that stops at the time limit."""

from __future__ import annotations

import json
import re
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from metalearn.commands.reproduce import run
from metalearn.commands.reproduce.plan import SETTINGS, build_rows, check_reproduce, published
from metalearn.commands.reproduce.run import FINISHED, UNFINISHED, TimeLimitReached, run_reproduction, time_limit
from metalearn.commands.reproduce.table import BEGIN, END, between_markers, read_rows, readme_table
from metalearn.config.commands_schema import ReproduceConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.config.run_config import to_yaml
from metalearn.core.errors import ConfigError, RunError
from tests.commands.process import words
from tests.paths import REPO

SMALL = words("""
data=glyphs data.classes=50 model.width=4 task.meta_batch=2 task.queries=1 outer.iterations=60 eval.every=20
eval.validation_episodes=2 eval.episodes=4 log.images=false log.every=100
""")
ROW = "omniglot_5way_1shot_cpu"
ACCURACIES = (0.98, 0.982, 0.987)


@pytest.fixture(autouse=True)
def _omniglot_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the folder that the configuration looks for."""
    (tmp_path / "data" / "omniglot-py" / "images_background").mkdir(parents=True)
    monkeypatch.setenv("METALEARN_DATA", str(tmp_path / "data"))


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary folder instead of the repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return tmp_path


def configuration(*overrides: str) -> ReproduceConfig:
    config = to_dataclass(compose("reproduce", [f"experiment_name={ROW}", *overrides]), ReproduceConfig)
    check_reproduce(config)
    return config


def finish(config: ReproduceConfig, folder: Path, **changed: Any) -> None:
    """Write the metrics that the trainings would."""
    for row in build_rows(config, folder):
        for job, accuracy in zip(row.jobs, ACCURACIES, strict=False):
            training = job.config
            job.folder.mkdir(parents=True, exist_ok=True)
            metrics = {
                "dataset": training.data.name,
                "algorithm": "maml",
                "second_order": training.inner.second_order,
                "seed": training.run.seed,
                "task": f"{training.task.ways}-way {training.task.shots}-shot",
                "iterations": training.outer.iterations,
                "test.episodes": 600,
                "test.accuracy": accuracy,
                "test.ci95": 0.001,
                "test.accuracy_nontransductive": accuracy - 0.04,
                "test.ci95_nontransductive": 0.002,
                "test.accuracy_per_step": [0.2, accuracy],
                "validation.best_accuracy": 0.99,
                "validation.best_iteration": 14_000,
                "time.total_s": 600.0 + 60 * training.run.seed,
                "machine.cpu": "a processor",
                "machine.cores": 2,
                **changed,
            }
            (job.folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["experiment_name=omniglot_5way_1sht"],
            r"experiment_name=omniglot_5way_1sht: .*Did you mean omniglot_5way_1shot.*The rows are omniglot_",
        ),
        (["experiment_name=../train"], r"experiment_name=\.\./train: there is no such experiment"),
        (["orders=[third]"], r"orders=\['third'\]: must be one of second, first"),
        (["orders=[first,first]"], r"orders=\[first,first\]: first is listed twice"),
        (["seeds=[]"], r"seeds=\[\]: must be one or more whole numbers"),
        (["seeds=[0,1,0]"], r"seeds=\[0,1,0\]: 0 is listed twice; leave one out"),
        (["time_limit_minutes=0"], r"time_limit_minutes=0: must be a number above 0"),
        (["jobs=0"], r"jobs=0: must be a whole number, at least 1"),
        (["overrides=['run.seed=3']"], r"overrides, 'run\.seed=3': seeds= lists the seeds; leave it out"),
        (["overrides=['+hydra.run.dir=x']"], r"overrides, '\+hydra\.run\.dir=x': folders are named by row"),
        (["overrides=['data.fallback=glyphs']"], r"never falls back to other data; data=glyphs asks for it"),
        (["overrides=['inner.second_ordr=true']"], r"Did you mean inner\.second_order\?"),
        (["overrides=['inner.steps=-1']"], rf"experiment_name={ROW}: inner\.steps=-1: must be a whole number"),
        (["overrides=['algorithm=maml++']"], r"maml\+\+"),
        (
            ["overrides=['data.root=/nonexistent']"],
            rf"{ROW}: data\.root=/nonexistent: there is no such folder",
        ),
        (
            ["update_reference=true", "overrides=['outer.lr=0.1']"],
            r"update_reference=true with overrides=\['outer\.lr=0\.1'\]: .*own in conf/",
        ),
        (
            ["update_reference=true", "overrides=['data=glyphs']"],
            r"=true with overrides=\['data=glyphs'\]",
        ),
    ],
)
def test_check_raises_when_config_is_wrong(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration(*overrides)


def test_recorded_row_may_override_how_it_is_computed(tmp_path: Path) -> None:
    config = configuration("update_reference=true", f"overrides=['inner.engine=adjoint','data.root={tmp_path}/data']")
    (row,) = build_rows(config, tmp_path)
    assert row.jobs[0].config.inner.engine == "adjoint"
    assert row.overrides == ["inner.engine=adjoint"], "the location of the data is left out"
    assert row.command == (
        f"python scripts/reproduce.py experiment_name={ROW} 'orders=[second]' 'seeds=[0,1,2]' "
        """'overrides=['"'"'inner.engine=adjoint'"'"']'"""
    )


def test_build_rows_has_a_job_per_order_and_seed(tmp_path: Path) -> None:
    rows = build_rows(configuration("orders=[second,first]", "seeds=[3,4]"), tmp_path)
    jobs = [job for row in rows for job in row.jobs]
    assert [(j.folder.name, j.config.inner.second_order, j.config.run.seed) for j in jobs] == [
        (f"{order}_order-seed{seed}", order == "second", seed) for order in ("second", "first") for seed in (3, 4)
    ]
    assert {job.folder.parent for job in jobs} == {tmp_path / ROW}
    assert "run.resume" not in " ".join(jobs[0].overrides), "the launcher adds it, with the folder"


def test_published_accuracies() -> None:
    def percent(algorithm: str, order: str) -> list[float]:
        found = [published(algorithm, order, ways, shots) for ways, shots in SETTINGS]
        return [round(100 * each.accuracy, 2) for each in found if each]

    assert percent("maml", "second") == [98.7, 99.9, 95.8, 98.9]
    assert percent("maml", "first") == [98.3, 99.2, 89.4, 97.9]
    assert percent("maml_pp", "second") == [99.47, 99.93, 97.65, 99.33]
    assert published("maml", "second", 10, 1) is None
    assert published("maml_pp", "first", 5, 1) is None


def test_results_are_over_seeds_and_recorded(recorded: Path) -> None:
    config = configuration("orders=[second,first]", "update_reference=true")
    finish(config, recorded / "rows")
    assert run_reproduction(config, recorded / "rows") == FINISHED
    second, first = read_rows(recorded / run.REFERENCE)
    assert read_rows(recorded / "rows" / "omniglot.json") == [second, first]
    assert (second["experiment"], second["algorithm"]) == (ROW, "maml")
    assert [row["order"] for row in (second, first)] == ["second", "first"]
    # Student's t for two degrees of freedom is 4.3027, and the standard error is that of three values.
    half = 4.302653 * statistics.stdev(ACCURACIES) / 3**0.5
    assert second["accuracy"] == {"mean": pytest.approx(0.983), "ci95": pytest.approx(half), "over": "seeds"}
    assert second["nontransductive"]["mean"] == pytest.approx(0.943)
    assert [(r["seed"], r["accuracy"], r["ci95"]) for r in second["runs"]] == [
        (seed, accuracy, 0.001) for seed, accuracy in enumerate(ACCURACIES)
    ]
    assert (second["iterations"], second["tasks_per_step"], second["minutes"]) == (15_000, 8, 11)
    assert second["machine"] == {"cpu": "a processor", "cores": "2"}
    assert second["published"] == {"accuracy": 0.987, "source": "Finn et al. 2017"}
    assert first["published"] == {"accuracy": 0.983, "source": "Nichol et al. 2018"}

    readme = (recorded / "README.md").read_text()
    assert readme.startswith(f"before\n{BEGIN}\n| task")
    assert readme.endswith(f"|\n{END}\nafter\n")
    assert "old" not in readme
    lines = readme.splitlines()
    line = (
        f"| 5-way 1-shot, `{ROW}` | second | 98.30% ± {half:.2%} | 3 | 94.30% ± {half:.2%} | 98.7% (Finn et al. 2017) "
        "| 15,000 of 8 tasks | 11 |"
    )
    missing = (
        "| 20-way 1-shot, `omniglot_20way_1shot` | first | not measured | - | - | 89.4% (Nichol et al. 2018) "
        "| 60,000 of 16 tasks | - |"
    )
    assert line in lines
    assert missing in lines
    assert readme.count("not measured") == 12  # of 4 settings in 3 rows, the measured ones are of other budgets
    tasks = [line.partition(",")[0] for line in lines if "-way" in line]
    assert tasks == sorted(tasks, key=lambda task: int(task[2:4].strip("-")) * 10 + int(task.split()[2][0]))


def test_interval_is_over_tasks_when_one_seed(recorded: Path) -> None:
    config = configuration("seeds=[0]", "update_reference=true")
    finish(config, recorded / "rows")
    run_reproduction(config, recorded / "rows")
    (row,) = read_rows(recorded / run.REFERENCE)
    assert row["accuracy"] == {"mean": 0.98, "ci95": 0.001, "over": "tasks"}
    assert "| 98.00% ± 0.10% (over tasks) | 1 |" in (recorded / "README.md").read_text()


def test_row_is_not_replaced_when_it_has_more_seeds(recorded: Path) -> None:
    reference = recorded / run.REFERENCE
    (recorded / "README.md").write_text("no markers\n")
    two = configuration("seeds=[0,1]", "update_reference=true")
    finish(two, recorded / "rows")
    run_reproduction(two, recorded / "rows")
    (row,) = read_rows(reference)
    other = {**row, "experiment": "another", "mine": "untouched"}
    reference.write_text(json.dumps({"rows": [other, row]}))
    before = reference.read_text()
    with pytest.raises(
        RunError, match=rf"seeds=\[0\]: .*omniglot\.json holds {ROW}, second order, with more seeds, \[0, 1\]"
    ):
        run_reproduction(configuration("seeds=[0]", "update_reference=true"), recorded / "rows")
    assert reference.read_text() == before
    three = configuration("update_reference=true")
    finish(three, recorded / "rows")
    run_reproduction(three, recorded / "rows")
    kept, row = read_rows(reference)
    assert kept == other
    assert row["seeds"] == [0, 1, 2]
    assert (recorded / "README.md").read_text() == "no markers\n"


def test_table_is_printed_when_readme_has_no_markers(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for readme in ("nothing", f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        (recorded / "README.md").write_text(readme)
        run.write_readme([])
        assert (recorded / "README.md").read_text() == readme
        output = capsys.readouterr().out
        assert "README.md has no place for the table" in output
        assert readme_table([]) in output
    (recorded / "README.md").unlink()
    run.write_readme([])
    assert not (recorded / "README.md").exists()
    assert readme_table([]) in capsys.readouterr().out


def test_only_finished_orders_are_saved_at_time_limit(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(configuration("orders=[first]"), recorded / "rows")
    config = configuration("orders=[second,first]", "time_limit_minutes=7")

    def over(*arguments: Any, **settings: Any) -> None:
        raise TimeLimitReached

    monkeypatch.setattr(run, "launch", over)
    state = recorded / "rows" / ROW / "second_order-seed0" / "checkpoints" / "state-00004321.pt"
    state.parent.mkdir(parents=True)
    state.touch()
    monkeypatch.setattr("sys.argv", ["scripts/reproduce.py", f"experiment_name={ROW}", "time_limit_minutes=7"])
    assert run_reproduction(config, recorded / "rows") == UNFINISHED
    (row,) = read_rows(recorded / "rows" / "omniglot.json")
    assert row["order"] == "first"
    output = capsys.readouterr().out
    assert "The time limit of 7 minutes is reached." in output
    assert "second_order-seed0: 4321 of 15000 meta-steps" in output
    assert "3 of 6 runs are finished. The same command resumes here:" in output
    assert f"python scripts/reproduce.py experiment_name={ROW} time_limit_minutes=7" in output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"iterations": 7000}, r"is of another run: its iterations is 7000, but 15000 is requested"),
        ({"dataset": "glyphs"}, r"its dataset is glyphs, but omniglot is requested"),
    ],
)
def test_raises_when_metrics_are_of_another_run(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = configuration()
    finish(config, tmp_path / "rows", **changed)
    with pytest.raises(RunError, match=message):
        run_reproduction(config, tmp_path / "rows")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rows": 3'])
def test_raises_when_a_file_is_damaged(text: str, tmp_path: Path) -> None:
    config = configuration()
    finish(config, tmp_path)
    damaged = tmp_path / ROW / "second_order-seed1" / "metrics.json"
    damaged.write_text(text)
    with pytest.raises(RunError, match=r"seed1/metrics\.json does not hold the metrics of a .* run.*Remove the file"):
        run_reproduction(config, tmp_path)
    (tmp_path / "omniglot.json").write_text(text)
    with pytest.raises(RunError, match=r"omniglot\.json is not a file of rows.*Move it away, or restore it"):
        run_reproduction(config, tmp_path)


def test_raises_when_folder_has_another_config(tmp_path: Path) -> None:
    config = configuration()
    finish(config, tmp_path)
    (job, *_) = build_rows(configuration("overrides=['inner.lr=0.3']"), tmp_path)[0].jobs
    (job.folder / "config.yaml").write_text(to_yaml(job.config))
    with pytest.raises(
        RunError, match=r"inner\.lr: 0\.3 in the folder, 0\.4 now\nUse the same values, .*hydra\.run\.dir=PATH\.$"
    ):
        run_reproduction(config, tmp_path)


def test_time_limit_interrupts_only_its_block() -> None:
    with time_limit(None):
        pass
    with pytest.raises(TimeLimitReached), time_limit(0.05 / 60):
        time.sleep(10)
    with time_limit(0.05 / 60):
        pass
    time.sleep(0.1)


def test_same_command_resumes_after_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ",".join(f"'{override}'" for override in SMALL)
    config = configuration("seeds=[5]", "time_limit_minutes=1", f"overrides=[{small}]")
    folder = tmp_path / ROW / "second_order-seed5"

    @contextmanager
    def until_first_state(minutes: float | None) -> Iterator[None]:
        """Reach the time limit when there is a state to resume from, however busy the machine is."""

        def look(number: int, frame: FrameType | None) -> None:
            if any(folder.glob("checkpoints/state-*.pt")):
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise TimeLimitReached

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    with monkeypatch.context() as patch:
        patch.setattr(run, "time_limit", until_first_state)
        assert run_reproduction(config, tmp_path) == UNFINISHED
    assert not (folder / "metrics.json").exists()
    assert not (tmp_path / "omniglot.json").exists()

    assert run_reproduction(config, tmp_path) == FINISHED
    assert re.search(r"from meta-step [1-9]", (folder / "train.log").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    (row,) = json.loads((tmp_path / "omniglot.json").read_text())["rows"]
    assert row["accuracy"] == {"mean": metrics["test.accuracy"], "ci95": metrics["test.ci95"], "over": "tasks"}
    assert (row["dataset"], row["published"], row["seeds"]) == ("glyphs", None, [5])

    with monkeypatch.context() as patch:
        patch.setattr(run, "launch", None)
        assert run_reproduction(config, tmp_path) == FINISHED, "nothing is trained again"


def test_readme_table_equals_committed_results() -> None:
    readme = (REPO / run.README).read_text()
    assert BEGIN in readme
    assert between_markers(readme) == readme_table(read_rows(REPO / run.REFERENCE))


def test_recorded_rows_follow_the_protocol() -> None:
    if not (REPO / run.REFERENCE).exists():
        pytest.skip("no row is recorded: python scripts/reproduce.py experiment_name=… update_reference=true")
    for row in read_rows(REPO / run.REFERENCE):
        assert row["dataset"] == "omniglot"
        assert row["test_tasks"] >= 600
        assert row["seeds"] == [each["seed"] for each in row["runs"]]
        assert row["nontransductive"] is not None
        assert all(each["chosen_at"] <= row["iterations"] for each in row["runs"])


def test_code_that_is_not_there_is_named_before_a_run_is_started(tmp_path: Path) -> None:
    own = "overrides=['model=custom','model.target=metalearn.models:Conv5','data=glyphs']"
    with pytest.raises(ConfigError, match=r"model\.target=metalearn\.models:Conv5: metalearn\.models has no Conv5"):
        run_reproduction(configuration("seeds=[0]", own), tmp_path / "out")
    assert not (tmp_path / "out").exists()
