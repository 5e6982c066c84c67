"""The results of rows: over seeds or tasks, and where they are written."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from metalearn.commands.reproduce import run
from metalearn.commands.reproduce.run import FINISHED, run_reproduction
from metalearn.commands.reproduce.table import ROTATED, cells, read_rows
from metalearn.core.errors import RunError
from tests.commands.reproduce.factories import ACCURACIES, ROW, configuration, finish
from tests.paths import REPO


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
    assert second["commits"] == ["0123abc"]
    assert second["rotated"] == {"mean": pytest.approx(0.973), "ci95": pytest.approx(half), "over": "seeds"}
    gains = [0.1, 0.2, 0.15]  # of each seed, over the same two tasks
    of_seeds = 4.302653 * statistics.stdev(gains) / 3**0.5
    assert second["gain"] == {
        "mean": pytest.approx(0.15),
        "ci95": pytest.approx(of_seeds),
        "over": "seeds",
        "runs": pytest.approx(gains),
    }
    assert first["gain"] is None
    assert second["published"] == {"accuracy": 0.987, "source": "Finn et al. 2017"}
    assert first["published"] == {"accuracy": 0.983, "source": "Nichol et al. 2018"}

    assert cells(second) == {
        "accuracy": f"98.30% ± {half:.2%}",
        "gain over first order": f"+15.00 ± {100 * of_seeds:.2f}",
        "non-transductive": f"94.30% ± {half:.2%}",
        "rotated test classes": f"97.30% ± {half:.2%}",
        "published": "98.7% (Finn et al. 2017)",
        "seeds": "0 1 2",
        "minutes a seed": "11",
    }


def test_what_was_measured_is_kept_when_it_is_gathered_again(recorded: Path) -> None:
    both, second = configuration("orders=[second,first]"), configuration("orders=[second]")
    finish(both, recorded / "rows")
    run_reproduction(both, recorded / "rows")
    path = recorded / "rows" / "omniglot.json"
    before = read_rows(path)
    run_reproduction(second, recorded / "rows")
    assert read_rows(path) == before, "the runs of first order are still beside them"
    for folder in (recorded / "rows" / ROW).glob("*-seed*"):
        for name in ("test_tasks.json", f"{ROTATED}/metrics.json"):
            (folder / name).unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate_run", lambda *arguments: None)
        run_reproduction(second, recorded / "rows")
    assert read_rows(path) == before, "archived without the tasks"
    finish(second, recorded / "rows", **{"rotated": False, "validation.best_iteration": 13_000})
    (recorded / "rows" / ROW / "first_order-seed0" / "metrics.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate_run", lambda *arguments: None)
        run_reproduction(second, recorded / "rows")
    assert [read_rows(path)[0][name] for name in ("gain", "rotated")] == [None, None], "these are other runs"


@pytest.mark.parametrize("damaged", ["", "{}", "[]", '{"accuracy": [1.0]}', None])
def test_gain_is_left_out_without_the_tasks(damaged: str | None, recorded: Path) -> None:
    config = configuration("orders=[second,first]")
    finish(config, recorded / "rows")
    path = recorded / "rows" / ROW / "first_order-seed1" / "test_tasks.json"
    path.unlink() if damaged is None else path.write_text(damaged)
    assert run_reproduction(config, recorded / "rows") == FINISHED
    assert [row["gain"] for row in read_rows(recorded / "rows" / "omniglot.json")] == [None, None]


def test_interval_is_over_tasks_when_one_seed(recorded: Path) -> None:
    config = configuration("seeds=[0]", "update_reference=true")
    finish(config, recorded / "rows")
    run_reproduction(config, recorded / "rows")
    (row,) = read_rows(recorded / run.REFERENCE)
    assert row["accuracy"] == {"mean": 0.98, "ci95": 0.001, "over": "tasks"}
    assert [cells(row)[name] for name in ("accuracy", "gain over first order")] == ["98.00% ± 0.10% (over tasks)", "-"]


def test_row_is_not_replaced_when_it_has_more_seeds(recorded: Path) -> None:
    reference = recorded / run.REFERENCE
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


def test_recorded_rows_follow_the_protocol() -> None:
    if not (REPO / run.REFERENCE).exists():
        pytest.skip("no row is recorded: python scripts/reproduce.py experiment_name=… update_reference=true")
    for row in read_rows(REPO / run.REFERENCE):
        assert row["dataset"] == "omniglot"
        assert row["test_tasks"] >= 600
        assert row["seeds"] == [each["seed"] for each in row["runs"]]
        assert row["nontransductive"] is not None
        assert all(each["chosen_at"] <= row["iterations"] for each in row["runs"])
