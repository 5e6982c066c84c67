"""The table of distances of float32 to float64: its file and its methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metalearn.commands.benchmark import float32
from metalearn.commands.benchmark.float32 import add_biases, run_float32_table
from metalearn.commands.benchmark.methods import BY_HAND, OURS
from metalearn.metagrad import ENGINES
from metalearn.models import Conv4
from tests.commands.benchmark.factories import TINY, config


def test_table_has_every_engine_and_the_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(float32, "FLOAT32_SETTINGS", (TINY,))
    run_float32_table(config("bench.kind=float32", "bench.repeats=3", "run.seed=4"), tmp_path)
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["seeds"] == [4, 5, 6]
    rows = {(row["pool"], row["biases"], row["second_order"], row["who"]): row for row in report["rows"]}
    names = {True: {*(f"{OURS} {engine}" for engine in ENGINES), BY_HAND}, False: {f"{OURS} unroll", BY_HAND}}
    for pool in ("stride", "max"):
        for biases in (False, True):
            for second_order, expected in names.items():
                assert {label for *key, label in rows if key == [pool, biases, second_order]} == expected
    for row in rows.values():
        assert row["median"] == sorted(row["distances"])[1]
        assert 0 < row["median"] < 1e-4
        assert row["times_plain"] > 0
        assert row["far"] == sum(distance > 1e-3 for distance in row["distances"])
    assert "median of 3 seeds" in capsys.readouterr().out


def test_conv4_with_biases_is_not_batched_as_a_whole() -> None:
    module = Conv4(3, width=4, pool="max")
    add_biases(module)
    assert not module.supports_batched_forward()
    assert module(torch.zeros(6, 1, 28, 28)).shape == (6, 3)
    assert len([name for name, _ in module.named_parameters() if name.endswith(".0.bias")]) == 4
