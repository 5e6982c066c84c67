"""Intervals over seeds, results of a comparison from folders written by hand, and why runs failed."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress
from torch.utils.tensorboard import SummaryWriter

from metalearn.commands.benchmark.engines import MeasurementPlan
from metalearn.commands.benchmark.settings import EngineCost
from metalearn.commands.compare import gather
from metalearn.commands.compare.gather import choose_target, collect_results, differences, measure_engine_costs
from metalearn.commands.compare.launch import describe_finished, failure_reason
from metalearn.commands.compare.results import TimeToAccuracy
from metalearn.commands.compare.run import mark_incomplete, train_missing
from metalearn.commands.compare.statistics import difference, seed_ci
from metalearn.commands.compare.variants import Job, Variant, jobs, parse_variants, to_train_config
from metalearn.commands.output_folders import RESULTS_FILE
from metalearn.config.commands_schema import CompareConfig
from metalearn.config.compose import compose, to_dataclass
from metalearn.core.errors import RunError

SMALL_TASK = ["data=glyphs", "data.classes=50", "model.width=8", "task.meta_batch=2"]


def test_seed_ci_equals_students_t() -> None:
    # means 0.90, 0.92, 0.94: s = 0.02, t(0.975, 2) = 4.302653 (any table), half-width 4.302653 * 0.02 / sqrt(3)
    estimate = seed_ci([0.90, 0.92, 0.94], [0.01, 0.01, 0.01])
    assert estimate.mean == pytest.approx(0.92)
    assert estimate.ci95 == pytest.approx(4.302653 * 0.02 / math.sqrt(3), rel=1e-6)


def test_seed_ci_is_never_narrower_than_over_tasks() -> None:
    assert seed_ci([0.9, 0.9, 0.9], [0.03, 0.03, 0.03]).ci95 == pytest.approx(0.03 / math.sqrt(3))
    tasks = [0.4, 0.6, 0.2, 0.8]
    estimate, _ = difference([tasks, tasks], [list(reversed(tasks)), list(reversed(tasks))], paired=True)
    assert estimate.mean == 0
    assert estimate.ci95 > 0.1


def test_difference_is_narrower_when_paired() -> None:
    easy_and_hard = [0.2, 0.9, 0.4, 1.0]
    better = [x + d for x, d in zip(easy_and_hard, [0.05, 0.03, 0.05, 0.03], strict=True)]
    paired, per_seed = difference([better], [easy_and_hard], paired=True)
    apart, _ = difference([better], [easy_and_hard], paired=False)
    assert per_seed == pytest.approx([0.04])
    # s of the four differences is 0.02 / sqrt(3)
    assert paired.ci95 == pytest.approx(1.96 * 0.02 / math.sqrt(3) / 2)
    assert apart.mean == pytest.approx(paired.mean)
    assert apart.ci95 > 20 * paired.ci95


def test_difference_covers_truth_in_95_percent() -> None:
    # The truth is 0.1; a seed moves it by 0.02, a task by 0.2. Of 2,000 comparisons of 3 seeds 95% must cover it.
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        shifts = 0.1 + 0.02 * generator.standard_normal(3)
        first = [(s + 0.2 * generator.standard_normal(50)).tolist() for s in shifts]
        estimate, _ = difference(first, [[0.0] * 50] * 3, paired=True)
        covered += abs(estimate.mean - 0.1) <= estimate.ci95
    assert 0.935 < covered / 2000 < 0.985, "a little more than 95%, as it is never below that over tasks"


@pytest.mark.parametrize(
    ("status", "written", "reason"),
    [
        (
            2,
            "Run folder: x\nRunError: Training has diverged\nby meta-step 3\n",
            "RunError: Training has diverged\nby meta-step 3",
        ),
        (
            1,
            "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA\n",
            "torch.OutOfMemoryError: CUDA",
        ),
        (1, "ConfigError: old\nValueError: new", "ValueError: new"),
        (1, "RunError: real\nException ignored in: <x>\n", "RunError: real\nException ignored in: <x>"),
        (1, "OSError: full\n\nSet the environment variable HYDRA_FULL_ERROR=1 for ...\n", "OSError: full"),
        (-9, "fine so far", "ended by SIGKILL; the system does this when memory runs out"),
        (-15, "", "ended by SIGTERM"),
        (3, "one\nlast words\n", "exit status 3: last words"),
        (0, "", "exit status 0: it wrote nothing"),
    ],
)
def test_failure_reason_is_the_last_error(status: int, written: str, reason: str, tmp_path: Path) -> None:
    assert failure_reason(status, written, tmp_path) == reason


def test_finished_run_is_announced_with_its_accuracy(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"score": "accuracy", "test.accuracy": 0.856, "test.ci95": 0.014}')
    assert describe_finished(tmp_path) == "finished, test accuracy 85.60% ± 1.40%"


def test_run_with_metrics_is_finished_whatever_its_status(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"test.ci95": 0.1}')
    assert failure_reason(-9, "RunError: x", tmp_path) is None


def write_run(job: Job, tasks: list[float], validation: list[float], seconds: float) -> None:
    mean = sum(tasks) / len(tasks)
    metrics = {
        "test.accuracy": mean,
        "test.ci95": 0.01,
        "test.accuracy_per_step": [0.2, mean],
        "test.ci95_per_step": [0.0, 0.01],
        "test.accuracy_nontransductive": mean - 0.1,
        "test.ci95_nontransductive": 0.02,
        "time.meta_step_ms": 10.0 * seconds,
        "memory.peak_mib": 50.0 + job.config.run.seed,
    }
    job.folder.mkdir(parents=True)
    writer = SummaryWriter(str(job.folder))
    for i, accuracy in enumerate(validation, start=1):
        writer.add_scalar("accuracy/validation", accuracy, 100 * i)
        writer.add_scalar("cost/training_s", seconds * i, 100 * i)
        writer.add_scalar("gradients/cosine_first_vs_second", 0.5 + 0.1 * i, 100 * i)
    writer.close()
    nontransductive = [value - 0.1 for value in tasks]
    (job.folder / "test_tasks.json").write_text(
        json.dumps({"accuracy": tasks, "accuracy_nontransductive": nontransductive})
    )
    (job.folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Variant], list[Job]]:
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    variants = parse_variants(to_dataclass(compose("compare"), CompareConfig))
    every = jobs(variants, [0, 1], tmp_path)
    second_0, first_0, second_1, first_1 = every
    write_run(second_0, [0.9, 0.8, 1.0], [0.5, 0.8, 0.9], seconds=2.0)
    write_run(first_0, [0.8, 0.7, 0.9], [0.4, 0.75, 0.8], seconds=1.0)
    write_run(second_1, [1.0, 0.8, 0.9], [0.6, 0.7, 0.85], seconds=4.0)
    write_run(first_1, [0.7, 0.6, 0.8], [0.5, 0.6, 0.764], seconds=3.0)
    return variants, every


def test_metrics_of_a_variant(comparison: tuple[list[Variant], list[Job]]) -> None:
    variants, every = comparison
    (second, first), target = collect_results(variants, every, {}, None)
    assert target == 0.76, "all four reach 76% (the last 76.4%), not all 77%"
    assert [run.state for run in second.runs] == ["finished", "finished"]
    assert second.accuracy is not None
    assert second.accuracy.mean == pytest.approx(0.9)
    assert second.accuracy.ci95 == pytest.approx(0.01 / 2**0.5), "equal by chance: that over tasks, 0.01 each"
    assert second.nontransductive is not None
    assert second.nontransductive.mean == pytest.approx(0.8)
    assert first.accuracy is not None
    # means 0.8 and 0.7: t(0.975, 1) = 12.7062, s / sqrt(2) = 0.05
    assert first.accuracy.ci95 == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert [e.mean for e in first.per_step] == pytest.approx([0.2, 0.75])
    assert (second.meta_step_ms, second.peak_mib, second.training_s) == (30.0, 51.0, 9.0)
    assert second.time_to is not None
    assert second.time_to == TimeToAccuracy(4.0, 200, 2), (
        "4 s at 200 for seed 0, 12 s at 300 for seed 1; the lower of two"
    )
    point = second.curve[1]
    assert (point.iteration, point.training_s) == (200, 6.0)
    assert (point.low, point.mean, point.high) == pytest.approx((0.7, 0.75, 0.8))
    assert [p.mean for p in first.cosine] == pytest.approx([0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("validated", "target"),
    [
        ([[0.5, 0.9], [0.4, 0.761]], 0.76),  # what both reach, one of them at first
        ([[0.93, 0.96], [0.90, 0.94], [0.55, 0.56]], 0.94),  # nearly all reach 56% at first; two of three reach 94%
        ([[0.96, 0.9], [0.94, 0.9]], 0.96),  # no target is reached later
    ],
)
def test_target_is_not_below_most_first_validations(validated: list[list[float]], target: float) -> None:
    assert choose_target(validated) == target


def test_engines_are_measured_within_the_time_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = to_dataclass(compose("compare", SMALL_TASK), CompareConfig)
    shared, measured, interrupted = to_train_config(config), list[int](), list[int]()

    def measure(problem: object, inners: object, plan: MeasurementPlan, progress: Progress) -> list[EngineCost]:
        if plan.steps == interrupted:
            raise KeyboardInterrupt
        measured.append(*plan.steps)
        return [EngineCost(e, True, None, 1, plan.steps[0], 50.0, 100.0 * plan.steps[0]) for e in ("unroll", "adjoint")]

    def costs(budget_s: float) -> tuple[list[EngineCost], list[int]]:
        measured.clear()
        with Progress() as progress:
            return measure_engine_costs(shared, config.compare, tmp_path, progress, budget_s=budget_s)

    monkeypatch.setattr(gather, "measure", measure)
    # A round takes 0.2 s at K = 1, and 7 + 4 are taken: 2.2 s, then 4.4 s at K = 2, 11 s at 5 and 22 s at 10.
    with caplog.at_level("INFO"):
        assert costs(0.0)[1] == [2, 5, 10]
    assert measured == [1], "inner.steps, whatever it takes"
    assert "K = 2, 5, 10 left out" in caplog.text
    assert costs(6.7)[1] == [5, 10]
    assert measured == [2], "K = 1 is in cost.json"
    assert costs(6.7)[1] == [5, 10]
    assert measured == [], "the same command has no more time than before"
    interrupted = [10]
    with pytest.raises(KeyboardInterrupt):
        costs(1000.0)
    assert measured == [5]
    interrupted = []
    rows, left_out = costs(1000.0)
    assert (measured, left_out) == ([10], []), "what was measured before the interruption is kept"
    assert [row.steps for row in rows if row.engine == "unroll"] == [1, 2, 5, 10]


def test_time_to_accuracy_when_target_is_set(comparison: tuple[list[Variant], list[Job]]) -> None:
    (second, first), target = collect_results(*comparison, {}, 0.88)
    assert target == 0.88
    assert second.time_to == TimeToAccuracy(6.0, 300, 1), "only seed 0 reaches it"
    assert first.time_to is None
    (exactly, _), _ = collect_results(*comparison, {}, 0.9)
    assert exactly.time_to == TimeToAccuracy(6.0, 300, 1), "0.9 is a little less in an event file's float32"


def test_differences_are_paired_by_seed(comparison: tuple[list[Variant], list[Job]], tmp_path: Path) -> None:
    variants, every = comparison
    found, _ = collect_results(variants, every, {}, None)
    (difference,) = differences(variants, found, tmp_path)
    assert (difference.first, difference.other, difference.seeds) == ("second_order", "first_order", [0, 1])
    assert difference.per_seed == pytest.approx([0.1, 0.2])
    assert difference.accuracy.mean == pytest.approx(0.15)
    assert difference.accuracy.ci95 == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert not difference.is_significant


def test_one_seed_is_paired_by_task_only_when_tasks_are_equal(
    comparison: tuple[list[Variant], list[Job]], tmp_path: Path
) -> None:
    variants, every = comparison
    some = [job for job in every if job.config.run.seed == 0]
    found, _ = collect_results(variants, some, {}, None)
    (paired,) = differences(variants, found, tmp_path)
    assert paired.accuracy.ci95 == pytest.approx(0.0, abs=1e-9), "every task differs by 0.1"
    assert paired.is_significant
    config = variants[1].config
    other = dataclasses.replace(config, eval=dataclasses.replace(config.eval, queries=5))
    (apart,) = differences([variants[0], dataclasses.replace(variants[1], config=other)], found, tmp_path)
    assert apart.accuracy.ci95 > 0.1


def test_failed_and_missing_runs_have_no_metrics(comparison: tuple[list[Variant], list[Job]], tmp_path: Path) -> None:
    variants, every = comparison
    for job in every[1:]:
        (job.folder / "metrics.json").unlink()
    found, target = collect_results(variants, every, {every[1].folder: "RunError: diverged"}, None)
    second, first = found
    assert target == 0.9
    assert [(run.state, run.reason) for run in first.runs] == [("failed", "RunError: diverged"), ("unfinished", None)]
    assert first.accuracy is None
    assert first.curve == []
    assert second.accuracy is not None
    assert second.accuracy.ci95 == 0.01, "one seed: over its tasks"
    assert differences(variants, found, tmp_path) == []


def test_no_target_when_nothing_is_finished(comparison: tuple[list[Variant], list[Job]]) -> None:
    variants, every = comparison
    for job in every:
        (job.folder / "metrics.json").unlink()
    found, target = collect_results(variants, every, {}, None)
    assert target is None
    assert all(not variant.finished for variant in found)


DAMAGED = ["", "{", "[]", "[" * 100_000, '{"test.ci95": 0.01}', "\0" * 4096]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_metrics_are_named_before_anything_is_trained(
    text: str, comparison: tuple[list[Variant], list[Job]], tmp_path: Path
) -> None:
    _, every = comparison
    (every[-1].folder / "metrics.json").write_text(text)
    with pytest.raises(RunError, match=r"first_order-seed1/metrics\.json does not hold .*Remove the file, and"):
        train_missing(every, None, tmp_path)
    with pytest.raises(RunError, match=r"first_order-seed1/metrics\.json does not hold"):
        collect_results(*comparison, {}, None)


@pytest.mark.parametrize("text", [None, *DAMAGED])
def test_damaged_test_tasks_are_named(
    text: str | None, comparison: tuple[list[Variant], list[Job]], tmp_path: Path
) -> None:
    variants, every = comparison
    found, _ = collect_results(variants, every, {}, None)
    path = every[0].folder / "test_tasks.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(RunError, match=r"second_order-seed0/test_tasks\.json.*Remove .*seed0/metrics\.json, and the"):
        differences(variants, found, tmp_path)


@pytest.mark.parametrize("text", [*DAMAGED, '{"rows": 3}', '{"rows": [{}]}'])
def test_damaged_costs_are_measured_again(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / gather.COST_FILE).write_text(text)
    assert gather._read_costs(tmp_path / gather.COST_FILE, {}) == []
    assert gather.COST_FILE in caplog.text


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_results_are_marked_incomplete(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / RESULTS_FILE).write_text(text)
    mark_incomplete(tmp_path)
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["complete"] is False
    assert (RESULTS_FILE in caplog.text) == (text != DAMAGED[4])


def test_run_that_leaves_damaged_metrics_has_failed(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("")
    assert "metrics.json does not hold the metrics" in str(failure_reason(0, "fine", tmp_path))
