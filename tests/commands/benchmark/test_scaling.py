"""The estimate is the formula's, the figures are what the processes wrote, and what starts them is what is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metalearn.commands.benchmark import scaling
from metalearn.commands.benchmark.ring import Interconnect, all_reduce_s, efficiency, tasks_per_second
from metalearn.commands.benchmark.scaling import ProcessLayout, configuration, main, report, show, worker_command
from metalearn.training.experiment import build_experiment
from metalearn.training.runtime.distributed import DistributedContext

EIGHT = Interconnect("eight", 8, 100e9, 2e-6)


def test_all_reduce_around_a_ring() -> None:
    # 2 * 7/8 * 400 kB / 100 GB/s = 7 us, and 14 steps of 2 us: 28 us
    assert all_reduce_s(400_000, EIGHT) == pytest.approx(35e-6)
    # Two GPUs: each sends its half and gets the other's sum back, 400 kB in all: 4 us, and 2 steps.
    assert all_reduce_s(400_000, Interconnect("two", 2, 100e9, 2e-6)) == pytest.approx(8e-6)
    assert all_reduce_s(400_000, Interconnect("one", 1, 100e9, 2e-6)) == 0


def test_efficiency_is_the_share_of_computing() -> None:
    assert efficiency(35e-6, 400_000, EIGHT) == pytest.approx(0.5)
    assert efficiency(315e-6, 400_000, EIGHT) == pytest.approx(0.9)


def test_where_the_all_reduce_starts_to_matter() -> None:
    # 90% at 315 us of computing, which are 32 tasks: 32 / 315 us
    assert tasks_per_second(0.9, 32, 400_000, EIGHT) == pytest.approx(32 / 315e-6)


def written(meta_step_s: float, all_reduce_s: float | None = None) -> dict[str, Any]:
    machine = {"cpu": "some"}
    return {
        "meta_step_s": meta_step_s,
        "all_reduce_s": all_reduce_s,
        "gradient_bytes": 400_000,
        "machine": machine,
    }


FOUND = {
    ProcessLayout(1, 1): [written(0.2), written(0.9), written(0.2)],
    ProcessLayout(1, 2): [written(0.16), written(0.16), written(0.1)],
    ProcessLayout(2, 1): [written(0.125, 2e-3), written(0.125, 4e-3), written(0.5, 9e-3)],
}


def test_report_is_of_medians() -> None:
    content = report(FOUND, 32)
    alone, threads, processes = content["rows"]
    assert (alone["speed_up"], alone["efficiency"], alone["meta_steps_per_s"]) == (1, 1, 5)
    assert (threads["speed_up"], threads["efficiency"]) == (pytest.approx(1.25), pytest.approx(0.625))
    assert (processes["speed_up"], processes["efficiency"]) == (pytest.approx(1.6), pytest.approx(0.8))
    assert content["all_reduce_ms"] == pytest.approx(4)
    assert [estimate["gpus"] for estimate in content["estimates"]] == [8, 64]
    assert 0 < content["estimates"][1]["efficiency_at_1_ms"] < content["estimates"][0]["efficiency_at_1_ms"] < 1
    assert json.loads(json.dumps(content)) == content


def test_report_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(FOUND, 32))
    said = " ".join(capsys.readouterr().out.split())
    assert "takes 4.00 ms" in said
    assert "200.0" in said
    assert "InfiniBand" in said


def test_two_processes_are_torchruns() -> None:
    several = worker_command(ProcessLayout(2, 1), ["model.width=8"], 5, Path("x.json"))
    assert several[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    tail = ["-m", "metalearn.commands.benchmark.scaling", "x.json", "model.width=8", "--worker-threads=1", "--steps=5"]
    assert several[5:] == tail
    assert worker_command(ProcessLayout(1, 2), [], 5, Path("x.json"))[:3] == [
        sys.executable,
        "-m",
        "metalearn.commands.benchmark.scaling",
    ]


def test_the_default_is_finns_setting() -> None:
    config = configuration([])
    assert (config.task.ways, config.task.shots, config.task.meta_batch, config.data.name) == (5, 1, 32, "glyphs")
    assert configuration(["task.meta_batch=4", "model=mlp"]).task.meta_batch == 4


def test_a_process_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    small = ["data.classes=50", "model=mlp", "model.hidden=[8]", "task.meta_batch=2"]
    path = tmp_path / "1x1.json"
    main([str(path), *small, "--worker-threads=1", "--steps=2"])
    found = json.loads(path.read_text())
    theta = build_experiment(configuration(small)).theta
    assert found["gradient_bytes"] == sum(p.nbytes for p in theta.values())
    assert found["meta_step_s"] > 0
    assert found["all_reduce_s"] is None


def test_an_all_reduce_is_timed_between_all_processes() -> None:
    class Counting(DistributedContext):
        def all_reduce_sum(self, tensors: Any) -> Any:
            sizes.append(tensors[0].numel())
            return tensors

    sizes: list[int] = []
    assert scaling._all_reduce_s(torch.zeros(7), Counting(0, 2)) >= 0
    assert set(sizes[0::2]) == {1}, "all come this far"
    assert set(sizes[1::2]) == {7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inner.steps=-1"], r"inner\.steps=-1: must be a whole number"),
        (["run.precision=tf32"], r"run\.precision=tf32: .*run\.device is a CPU"),
    ],
)
def test_a_configuration_is_refused_first(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path), *arguments])


def test_what_was_measured_before_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / scaling.FILE).write_text("{}")
    with pytest.raises(SystemExit, match=r"scaling\.json is there already"):
        main([str(tmp_path)])


def test_a_process_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; print('it broke'); sys.exit(3)"
    monkeypatch.setattr(scaling, "worker_command", lambda *args: [sys.executable, "-c", code])
    with pytest.raises(SystemExit, match=r"processes=1, threads=1\) ended with status 3: it broke"):
        main([str(tmp_path), "--rounds=1"])


@pytest.mark.parametrize("flag", ["--rounds=0", "--steps=0"])
def test_nothing_to_measure_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), flag])
    assert "must be at least 1" in capsys.readouterr().err
