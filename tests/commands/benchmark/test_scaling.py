"""Scaling: the report of the measurements, and the processes that measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn.commands.benchmark import scaling
from metalearn.commands.benchmark.scaling import (
    ProcessLayout,
    load_config,
    main,
    print_summary,
    summarize,
    worker_command,
)
from metalearn.training.experiment import build_experiment
from metalearn.training.runtime.distributed import DistributedContext


def measurement(meta_step_s: float, all_reduce_s: float | None = None) -> dict[str, Any]:
    machine = {"cpu": "some"}
    return {"meta_step_s": meta_step_s, "all_reduce_s": all_reduce_s, "gradient_bytes": 400_000, "machine": machine}


FOUND = {
    ProcessLayout(1, 1): [measurement(0.2), measurement(0.9), measurement(0.2)],
    ProcessLayout(1, 2): [measurement(0.16), measurement(0.16), measurement(0.1)],
    ProcessLayout(2, 1): [measurement(0.125, 2e-3), measurement(0.125, 4e-3), measurement(0.5, 9e-3)],
}


def test_summary_has_medians() -> None:
    content = summarize(FOUND, 32)
    single, threads, processes = content["rows"]
    assert (single["speed_up"], single["efficiency"], single["meta_steps_per_s"]) == (1, 1, 5)
    assert (threads["speed_up"], threads["efficiency"]) == (pytest.approx(1.25), pytest.approx(0.625))
    assert (processes["speed_up"], processes["efficiency"]) == (pytest.approx(1.6), pytest.approx(0.8))
    assert content["all_reduce_ms"] == pytest.approx(4)
    assert json.loads(json.dumps(content)) == content


def test_summary_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(summarize(FOUND, 32))
    output = " ".join(capsys.readouterr().out.split())
    assert "takes 4.00 ms" in output
    assert "200.0" in output


def test_two_processes_are_started_by_torchrun() -> None:
    command = worker_command(ProcessLayout(2, 1), ["model.width=8"], 5, Path("x.json"))
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    tail = ["-m", "metalearn.commands.benchmark.scaling", "x.json", "model.width=8", "--worker-threads=1", "--steps=5"]
    assert command[5:] == tail
    alone = worker_command(ProcessLayout(1, 2), [], 5, Path("x.json"))
    assert alone[:3] == [sys.executable, "-m", "metalearn.commands.benchmark.scaling"]


def test_default_config_is_finns_setting() -> None:
    config = load_config([])
    assert (config.task.ways, config.task.shots, config.task.meta_batch, config.data.name) == (5, 1, 32, "glyphs")
    assert load_config(["task.meta_batch=4", "model=mlp"]).task.meta_batch == 4


def test_worker_writes_its_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    small = ["data.classes=50", "model=mlp", "model.hidden=[8]", "task.meta_batch=2"]
    path = tmp_path / "1x1.json"
    main([str(path), *small, "--worker-threads=1", "--steps=2"])
    found = json.loads(path.read_text())
    theta = build_experiment(load_config(small)).theta
    assert found["gradient_bytes"] == sum(p.nbytes for p in theta.values())
    assert found["meta_step_s"] > 0
    assert found["all_reduce_s"] is None


def test_all_reduce_is_timed_between_barriers() -> None:
    class Counting(DistributedContext):
        def all_reduce_sum(self, tensors: Any) -> Any:
            sizes.append(tensors[0].numel())
            return tensors

    sizes: list[int] = []
    assert scaling._all_reduce_s(torch.zeros(7), Counting(0, 2)) >= 0
    assert set(sizes[0::2]) == {1}, "the barriers"
    assert set(sizes[1::2]) == {7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inner.steps=-1"], r"inner\.steps=-1: must be a whole number"),
        (["run.precision=tf32"], r"run\.precision=tf32: .*run\.device is a CPU"),
        ([], r"scaling\.json exists already"),
    ],
)
def test_main_exits_when_it_cannot_measure(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / scaling.FILE).write_text("{}")
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path), *arguments])


def test_main_exits_when_a_worker_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('it broke'); sys.exit(3)"
    monkeypatch.setattr(scaling, "worker_command", lambda *args: [sys.executable, "-c", code])
    with pytest.raises(SystemExit, match=r"processes=1, threads=1\) ended with status 3: it broke"):
        main([str(tmp_path), "--rounds=1"])


@pytest.mark.parametrize("flag", ["--rounds=0", "--steps=0"])
def test_main_exits_when_rounds_or_steps_are_0(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), flag])
    assert "must be at least 1" in capsys.readouterr().err
