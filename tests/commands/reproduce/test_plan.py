"""The rows of a reproduction: checks of the configuration, jobs, and published accuracies."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalearn.commands.reproduce.plan import SETTINGS, build_rows, published
from metalearn.core.errors import ConfigError
from tests.commands.reproduce.factories import ROW, configuration


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
        "\"overrides=['inner.engine=adjoint']\""
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
