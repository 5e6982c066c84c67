"""What the pages say in words about the committed results is so."""

from __future__ import annotations

from typing import Any

import pytest

from docs.blocks.cost import engine_rows
from docs.blocks.markdown import REFERENCE, ROOT, accuracy, read

GETTING_STARTED = (ROOT / "docs" / "getting-started.md").read_text()


def test_summary() -> None:
    metrics = read("omniglot-5w1s/maml-second_order-seed0/metrics.json")
    for text in (
        f"{accuracy(metrics)} (95% CI, 600 tasks, 3 inner steps)",
        accuracy(metrics, "_nontransductive"),
        "  ".join(f"{k}: {score:.1%}" for k, score in enumerate(metrics["test.accuracy_per_step"])),
        f"{metrics['validation.best_accuracy']:.2%} at meta-step {metrics['validation.best_iteration']}",
        f"7000, {metrics['time.meta_step_ms']:.0f} ms each (median)",
        f"{metrics['memory.peak_mib']:.1f} MiB",
        f"{metrics['time.total_s'] / 60:.1f} min ",
    ):
        assert text in GETTING_STARTED


def test_exact_second_order_fits_into_first_order_memory() -> None:
    # The headline: less than first order on the same 16 tasks, and beyond the checkpoints no growth with K.
    rows = engine_rows("20way_1shot")
    first = rows["unroll", False, None, False, 10]["peak_mib"]
    at_one, at_ten = (rows["adjoint", True, 4, False, k] for k in (1, 10))
    nine_checkpoints = 9 * 4 * 113_236 * 4 / 2**20  # nine more of four tasks' 113,236 weights in float32
    assert at_ten["peak_mib"] < first
    assert at_ten["peak_mib"] - nine_checkpoints < 1.05 * at_one["peak_mib"]
    assert at_ten["ratio_to_unroll"] < 1.4
    assert rows["adjoint", True, 4, True, 50]["peak_mib"] < rows["unroll", False, None, False, 1]["peak_mib"]


def test_checkpoint_was_faster_than_unroll_at_ten_steps() -> None:
    assert engine_rows("20way_1shot")["checkpoint", True, None, False, 10]["ratio_to_unroll"] < 1


def test_verification_and_lessons_passed() -> None:
    assert read("verify-float64.json")["right"]
    assert all(lesson["right"] for lesson in read("lessons/lessons.json")["lessons"])


@pytest.mark.parametrize("folder", ["glyphs-5w1s", "omniglot-5w1s", "omniglot-20w1s"])
def test_second_order_is_ahead_beyond_its_interval(folder: str) -> None:
    results = read(f"compare/{folder}/results.json")
    (difference,) = results["differences"]
    assert results["complete"]
    assert [variant["name"] for variant in results["variants"]] == ["second_order", "first_order"]
    assert results["seeds"] == difference["seeds"] == [0, 1, 2]
    assert difference["accuracy"]["mean"] > difference["accuracy"]["ci95"]


def test_gap_is_widest_at_20_ways() -> None:
    def gap(folder: str) -> float:
        mean: float = read(f"compare/{folder}/results.json")["differences"][0]["accuracy"]["mean"]
        return mean

    assert gap("omniglot-20w1s") > max(gap("glyphs-5w1s"), gap("omniglot-5w1s"))


def test_share_of_logging_is_that_of_the_comparison() -> None:
    logged = read("compare/logging.json")["share"]["all"]
    runs = [r["metrics"] for v in read("compare/glyphs-5w1s/results.json")["variants"] for r in v["runs"]]
    share = sum(m["time.logging_s"] for m in runs) / sum(m["time.training_s"] for m in runs)
    assert logged == pytest.approx(share, abs=1e-4)
    assert share < 0.03


def test_family_has_learned() -> None:
    variants = read("compare/algorithms/results.json")["variants"]
    found = {v["name"].removeprefix("algorithm-"): v["accuracy"]["mean"] for v in variants}
    assert min(found.values()) > 0.4, "chance is 0.2"
    assert sorted(found, key=lambda name: found[name])[:2] == ["reptile", "imaml"], "which are clearly behind"


def test_sinusoids_are_as_in_the_paper() -> None:
    runs: list[dict[str, Any]] = [
        read(f"sinusoid/{path.name}") for path in (REFERENCE / "sinusoid").glob("shots10-*.json")
    ]
    assert len(runs) == 3
    for metrics in runs:
        after_one, after_ten = (metrics["test.mse_per_step"][k] for k in (1, 10))
        assert after_one < 0.8, "well under 1 after one step"
        assert after_ten < after_one


def test_every_fault_held() -> None:
    for row in read("faults.json")["rows"].values():
        assert row["held"] == row["tries"], row["fault"]
