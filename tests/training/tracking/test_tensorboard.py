"""Event files of runs, as TensorBoard's own readers and ``read_scalars`` see them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR
from tensorboard.context import RequestContext
from tensorboard.data.provider import ListHyperparametersResult
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context
from torch.utils.tensorboard import SummaryWriter

from metalearn.core.errors import RunError
from metalearn.training.evaluation import Evaluation
from metalearn.training.tracking.event_files import EVENT_FILES, ScalarEvent, read_scalars
from metalearn.training.tracking.tags import describe_tag
from metalearn.training.tracking.tensorboard import (
    MAIN_KEYS,
    EventWriter,
    TensorBoardLogger,
    Value,
    build_layout,
    experiment_summary,
    metric_columns,
    to_hparam_value,
)

LAYOUT = build_layout("accuracy", has_curvature=True, has_eigenvalue=True)
METRICS = metric_columns("accuracy")


def accumulated(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def multiplexed(folder: Path) -> EventMultiplexer:
    """Read a folder of runs as ``tensorboard --load_fast=false`` does."""
    return EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()


def tensorboard_context(folder: Path) -> TBContext:
    data = MultiplexerDataProvider(multiplexed(folder), str(folder))
    return TBContext(data_provider=data, logdir=str(folder))


def evaluation(*accuracies: float) -> Evaluation:
    """Return an evaluation of two tasks with scores 0.1 apart; the standard error is half of that."""
    by_task = torch.tensor(accuracies).unsqueeze(1) + torch.tensor([-0.05, 0.05])
    return Evaluation(by_task, nontransductive_scores=torch.tensor([0.5, 0.5]))


def test_resumed_run_has_every_point_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with TensorBoardLogger(run, config="a: 1\n") as tracker:
        for step in range(1, 51):
            tracker.log_scalars({"x": step, "rare": step} if step % 20 == 0 else {"x": step}, step)
    (first,) = run.glob(EVENT_FILES)
    first.write_bytes(first.read_bytes()[:-7])  # it was cut in the middle of a record
    with TensorBoardLogger(run, config="a: 1\n", resumed_at=30) as tracker:
        for step in range(31, 61):
            tracker.log_scalars({"x": 1000 + step}, step)
    assert len(list(run.glob(EVENT_FILES))) == 2
    expected = [(step, step if step <= 30 else 1000 + step) for step in range(1, 61)]
    assert [(p.step, p.value) for p in read_scalars(run)["x"]] == expected
    events = accumulated(run)
    assert [(e.step, e.value) for e in events.Scalars("x")] == expected
    assert [e.step for e in events.Scalars("rare")] == [20], "40 was after the cut"
    tensors = multiplexed(tmp_path).Tensors("run", "x")  # of a sample, but 60 points are fewer than it takes
    assert [e.step for e in tensors] == list(range(1, 61))


def test_read_scalars_returns_every_point_of_the_folder_itself(tmp_path: Path) -> None:
    before = time.time()
    with SummaryWriter(str(tmp_path)) as writer, TensorBoardLogger(tmp_path / "evaluations" / "a", config="") as other:
        for step in range(12_000):  # TensorBoard's reader keeps 10,000 unless told otherwise
            writer.add_scalar("a", step / 4, step)
        writer.add_scalar("b/c", -1.5, 7)
        other.log_scalars({"a": 2.0}, 13_000)
    scalars = read_scalars(tmp_path)
    assert set(scalars) == {"a", "b/c"}
    assert [(p.step, p.value) for p in scalars["a"]] == [(step, step / 4) for step in range(12_000)]
    (point,) = scalars["b/c"]
    assert point == ScalarEvent(7, point.wall_time, -1.5)
    assert before - 1 <= point.wall_time <= time.time() + 1


def test_repeated_test_counts_once(tmp_path: Path) -> None:
    for resumed_at, values in ((None, (0.2, 0.7, 0.8)), (40, (0.3, 0.6, 0.9))):
        with TensorBoardLogger(tmp_path, config="", resumed_at=resumed_at) as tracker:
            for step, value in enumerate(values):
                tracker.log_scalars({"accuracy/test_by_inner_step": value}, step)
    assert len(list(tmp_path.glob(EVENT_FILES))) == 2
    points = read_scalars(tmp_path)["accuracy/test_by_inner_step"]
    assert [p.step for p in points] == [0, 1, 2]
    assert [p.value for p in points] == pytest.approx(values)


def test_read_scalars_raises_without_event_files(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path} holds no event file"):
        read_scalars(tmp_path)


def test_config_and_layout_are_written_once(tmp_path: Path) -> None:
    for resumed_at in (None, 0, 30):
        with TensorBoardLogger(tmp_path, config="a: 1\n", resumed_at=resumed_at) as tracker:
            tracker.log_scalars({"x": 1.0}, (resumed_at or 0) + 1)
    events = accumulated(tmp_path)
    for tag in ("config/text_summary", "custom_scalars__config__"):
        assert len(events.Tensors(tag)) == 1, tag
    assert b"a: 1" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_event_files_of_one_second_are_read_in_order(tmp_path: Path) -> None:
    for n in range(12):  # names end with a number that counts on from 9 to 10, which sorts before it
        with TensorBoardLogger(tmp_path / str(n), config=""):
            pass
    with TensorBoardLogger(tmp_path / "run", config="") as tracker:
        tracker.log_scalars({"x": 1.0}, 1)
    (name,) = (path.name for path in (tmp_path / "run").glob(EVENT_FILES))
    with TensorBoardLogger(tmp_path / "run", config="", resumed_at=1):
        pass
    (later,) = {path.name for path in (tmp_path / "run").glob(EVENT_FILES)} - {name}
    assert later.split(".")[3] > name.split(".")[3]


def test_log_test_logs_scores_and_intervals(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path, config="") as tracker:
        tracker.log_test(evaluation(0.2, 0.7, 0.75), 400)
    curves = read_scalars(tmp_path)
    points = {tag: {p.step: round(p.value, 6) for p in curve} for tag, curve in curves.items()}
    ends = [points.pop(f"intervals/accuracy/test_by_inner_step_{end}") for end in ("low", "high")]
    assert ends == [{0: 0.102, 1: 0.602, 2: 0.652}, {0: 0.298, 1: 0.798, 2: 0.848}], "1.96 * 0.05"
    assert points == {
        "accuracy/test": {400: 0.75},
        "accuracy/test_by_inner_step": {0: 0.2, 1: 0.7, 2: 0.75},
        "accuracy/test_nontransductive": {400: 0.5},
    }


def write_run(folder: Path, values: dict[str, Value], *, test: float) -> None:
    with TensorBoardLogger(folder, config="", layout=LAYOUT) as tracker:
        for step in (10, 20):
            tracker.log_scalars({"cost/peak_mib": 50.0 + step, "cost/meta_step_ms": 5.0}, step)
        tracker.log_test(evaluation(0.2, test), 20)
        metrics = {"accuracy/test": test, "cost/peak_mib": 70.0, "cost/median_meta_step_ms": 6.0}
        tracker.log_hparams(values, metrics, 20)


def write_columns(folder: Path, runs: list[dict[str, Value]]) -> None:
    with EventWriter(folder) as writer:
        writer.add_summary(experiment_summary(runs, "accuracy"))


class HParams:
    """TensorBoard's table of a folder: its columns, and a row for each run."""

    def __init__(self, folder: Path) -> None:
        context = Context(tensorboard_context(folder))
        self.experiment: Any = context.experiment_from_metadata(
            RequestContext(),
            "",
            True,
            context.hparams_metadata(RequestContext(), ""),
            ListHyperparametersResult(hyperparameters=[], session_groups=[]),
        )
        wanted = api_pb2.ListSessionGroupsRequest(allowed_statuses=[api_pb2.STATUS_SUCCESS], slice_size=100)
        found = list_session_groups.Handler(RequestContext(), context, "", wanted).run()
        self.rows = {group.name: group for group in found.session_groups}
        self.columns = [info.name for info in self.experiment.hparam_infos]

    def values(self, run: str) -> dict[str, Any]:
        return {name: getattr(value, value.WhichOneof("kind")) for name, value in self.rows[run].hparams.items()}

    def metrics(self, run: str) -> dict[str, float]:
        return {metric.name.tag: metric.value for metric in self.rows[run].metric_values}


CONV: dict[str, Value] = {
    "inner.second_order": True,
    "inner.task_chunk": None,
    "model.name": "conv4",
    "model.dropout": 0.5,
}
MLP: dict[str, Value] = {"inner.second_order": False, "inner.task_chunk": 4, "model.name": "conv4", "model.layers": [3]}


@pytest.mark.parametrize("report", [True, False])
def test_hparams_table_has_every_key_of_every_run(report: bool, tmp_path: Path) -> None:
    write_run(tmp_path / "second_order-seed0", CONV, test=0.75)
    write_run(tmp_path / "mlp-seed0", MLP, test=0.5)
    if report:
        write_columns(tmp_path / "report", [CONV, MLP])
    table = HParams(tmp_path)
    assert set(table.rows) == {"second_order-seed0", "mlp-seed0"}, "no extra run, and the report is none"
    if report:
        assert table.columns == ["inner.second_order", "inner.task_chunk", "model.dropout", "model.layers"]
    else:  # TensorBoard's own choice
        assert set(table.columns) == set(CONV) | set(MLP)
        assert table.columns[:2] == ["inner.second_order", "inner.task_chunk"]
    assert table.values("second_order-seed0") == CONV | {"inner.second_order": "true", "inner.task_chunk": "null"}
    assert table.values("mlp-seed0") == MLP | {
        "inner.second_order": "false",
        "inner.task_chunk": "4",
        "model.layers": "[3]",
    }
    tags = [info.name.tag for info in table.experiment.metric_infos]
    assert tags == list(METRICS) if report else set(METRICS) < set(tags)
    metrics = table.metrics("second_order-seed0")
    assert [metrics[tag] for tag in METRICS] == pytest.approx([0.75, 0.5, 70.0, 6.0])


def test_hparams_columns_do_not_hide_other_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", CONV, test=0.75)
    write_columns(tmp_path / "report", [CONV, MLP])
    infos = {info.name: info for info in HParams(tmp_path).experiment.hparam_infos}
    assert infos["model.dropout"].type == api_pb2.DATA_TYPE_FLOAT64
    assert infos["inner.task_chunk"].type == api_pb2.DATA_TYPE_STRING, "null or a whole number, as text"
    assert not any(info.WhichOneof("domain") for info in infos.values()), "it would hide other runs"
    write_run(tmp_path / "equal" / "a", CONV, test=0.75)
    write_columns(tmp_path / "equal" / "report", [CONV])
    assert HParams(tmp_path / "equal").columns == ["inner.second_order", *sorted(CONV.keys() - {*MAIN_KEYS})], "all"


def test_log_hparams_repeats_no_point(tmp_path: Path) -> None:
    write_run(tmp_path / "run", CONV, test=0.75)
    with TensorBoardLogger(tmp_path / "run", config="", resumed_at=20) as tracker:  # cut after the last meta-step
        tracker.log_hparams(CONV, {"cost/peak_mib": 70.0}, 20)
    points = {tag: [e.step for e in accumulated(tmp_path / "run").Scalars(tag)] for tag in METRICS}
    assert points == {
        "accuracy/test": [20],
        "accuracy/test_nontransductive": [20],
        "cost/peak_mib": [10, 20],
        "cost/median_meta_step_ms": [20],
    }
    assert [path.is_file() for path in (tmp_path / "run").iterdir()] == [True, True], "add_hparams makes a folder"


def test_seeds_and_counts_read_as_they_were_given(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"run.seed": 0, "inner.lr": 0.4, "task.ways": 20}, test=0.75)
    assert HParams(tmp_path).values("a") == {"run.seed": "0", "inner.lr": 0.4, "task.ways": "20"}, "0 would be 0.0000"


def test_curves_are_described(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path / "run", config="") as tracker:
        for step in (1, 2):
            tracker.log_scalars({"gradients/adjoint_norm/step_0": 1.0, "accuracy/train": 0.5, "mine": 1.0}, step)
    data = MultiplexerDataProvider(multiplexed(tmp_path), str(tmp_path))
    found = data.list_scalars(RequestContext(), experiment_id="", plugin_name="scalars")["run"]
    assert found["gradients/adjoint_norm/step_0"].description.startswith("Norm of a task's query gradient")
    assert found["accuracy/train"].description.startswith("Accuracy on the queries of training tasks")
    assert found["mine"].description == ""
    record = accumulated(tmp_path / "run").SummaryMetadata("accuracy/train")
    assert record.data_class == DATA_CLASS_SCALAR, "TensorBoard's fast reader drops other records' descriptions"
    assert [e.value for e in accumulated(tmp_path / "run").Scalars("mine")] == [1.0, 1.0]


def test_every_charted_tag_is_described() -> None:
    for charts in LAYOUT.values():
        for _, tags in charts.values():
            for tag in tags:
                assert isinstance(tag, str)
                assert describe_tag(tag.strip("^$").replace(".*", "step_3")), tag


def test_chart_that_would_be_empty_is_left_out() -> None:
    plain = build_layout("mse", has_curvature=False, has_eigenvalue=False)
    assert list(plain) == ["Mse", "Cost"]
    assert plain["Mse"]["validation mse"] == ["Multiline", ["^mse/validation$"]]
    sharp = build_layout("accuracy", has_curvature=False, has_eigenvalue=True)
    assert list(sharp["Second order"]) == ["largest eigenvalue of the support loss"]
    default = build_layout("accuracy", has_curvature=True, has_eigenvalue=False)
    assert not any("eigenvalue" in title for title in default["Second order"])


def test_to_hparam_value_is_command_line_syntax() -> None:
    values = [to_hparam_value(value) for value in (True, False, None, 3, 0.4, "conv4", [1, None, True], [])]
    assert values == ["true", "false", "null", "3", 0.4, "conv4", "[1, null, true]", "[]"]


def test_layouts_of_several_runs_are_merged(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_run(tmp_path / name, CONV, test=0.75)
    plugin = CustomScalarsPlugin(tensorboard_context(tmp_path))
    merged = json.loads(plugin.layout_impl(RequestContext(), ""))
    titles = {category["title"]: [chart["title"] for chart in category["chart"]] for category in merged["category"]}
    assert titles == {category: list(charts) for category, charts in LAYOUT.items()}
    assert list(titles) == ["Accuracy", "Cost", "Second order"]


def test_every_chart_matches_its_curves() -> None:
    tags = [
        *("accuracy/validation", *(f"intervals/accuracy/validation_{end}" for end in ("low", "high"))),
        *("accuracy/train", "gradients/norm", "loss/query"),
        *(f"accuracy/test{end}" for end in ("", "_nontransductive")),
        *("accuracy/test_by_inner_step", *(f"intervals/accuracy/test_by_inner_step_{end}" for end in ("low", "high"))),
        *(f"cost/{name}" for name in ("meta_step_ms", "training_s", "median_meta_step_ms")),
        *("cost/peak_mib", "gradients/cosine_first_vs_second", "gradients/support_top_eigenvalue", "optimizer/lr"),
        *(f"gradients/adjoint_norm/step_{k}" for k in range(3)),
    ]
    taken = []
    for charts in LAYOUT.values():
        for title, (kind, patterns) in charts.items():
            matches = re.match if kind == "Multiline" else str.__eq__
            matched = [tag for tag in tags if any(matches(p, tag) for p in patterns)]
            assert len(matched) == (3 if kind == "Margin" or "adjoint" in title else 1), title
            taken += matched
    others = {"loss/query", "accuracy/test", "accuracy/test_nontransductive", "cost/median_meta_step_ms"}
    assert set(tags) - set(taken) == {*others, "optimizer/lr"}
