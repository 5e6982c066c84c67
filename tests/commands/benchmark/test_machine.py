"""What else ran during a benchmark is measured, and stands beside the machine in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from metalearn.commands.benchmark import machine
from metalearn.commands.benchmark.machine import describe_in_a_line, describe_machine, other_work
from tests.commands.benchmark.factories import CPU


def test_line_has_machine_threads_versions_and_other_work() -> None:
    found = describe_machine(CPU) | {"cpu": "Some CPU", "cores": 4, "cores_available": 2, "threads": 1, "torch": "3.0"}
    line = describe_in_a_line(found | {"peers": {"jax": "0.10.2"}}, {"others_cores": 1.25, "load_average": 2.04})
    assert line == (
        "Some CPU, 2 of 4 cores, torch on 1 thread; other work took 1.2 cores, load 2.0; torch 3.0, jax 0.10.2"
    )


def test_others_use_what_is_busy_beside_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    own, clock = iter([5.0, 12.0]), iter([100.0, 110.0])  # 0.7 cores for ten seconds
    monkeypatch.setattr(machine, "_own_seconds", lambda: next(own))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("psutil.cpu_percent", lambda: 50.0)
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    with other_work() as others:
        pass
    assert others["others_cores"] == pytest.approx(2 - 0.7)
    assert others["load_average"] >= 0


def test_own_time_has_that_of_children_before_and_after_their_end() -> None:
    before = machine._own_seconds()
    spin = "import time\nwhile time.process_time() < 1: pass\nprint('done', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        assert machine._own_seconds() - before >= 0.9
        child.communicate(b"\n")
    assert machine._own_seconds() - before >= 0.9
