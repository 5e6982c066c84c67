"""Configurations that cannot be run are refused at once, before torch is loaded."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.cases import cases
from tests.paths import REPO

RUN = """
import os, runpy, sys
script = sys.argv[1]
sys.argv = sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    loaded = {"torch", "torchvision", "matplotlib", "numpy"} & set(sys.modules)
    if loaded:
        print("LOADED", *sorted(loaded), file=sys.stderr)
"""


# Each: a command, its command line or its experiment file below the @package line, and a pattern for the message: key,
# value and remedy.
Case = tuple[str, "str | tuple[str, ...]", str]
CREATED = "made-by-a-stranger"
# fmt: off
ON_THE_COMMAND_LINE: list[Case] = [
    ("train", ("inner.second_ordr=true",), r"inner\.second_ordr=true: there is no such key\. Did you mean inner\.sec"),
    ("train", ("second_order=false",), r"second_order=false: .*Did you mean inner\.second_order\?"),
    ("train", ("inner.steps=many",), r"inner\.steps=many: must be a whole number, at least 0"),
    ("train", ("inner.lr=-1",), r"inner\.lr=-1: must be a number above 0"),
    ("train", ("task.ways=2000",), r"task\.ways=2000: at most 100"),
    ("train", ("model=resnet",), r"model=resnet: there is no such option\. .*conv4"),
    ("train", ("inner.engine=fast",), r"inner\.engine=fast: must be one of unroll, checkpoint, adjoint"),
    ("train", ("run.device=gpu",), r"run\.device=gpu: must be auto, cpu, cuda or cuda:N"),
    ("train", ("--multirun", "inner.steps=1,2,-3"), r"inner\.steps=-3: must be a whole number, at least 0"),
    ("train", ("data.root=/nonexistent",), r"data\.root=/nonexistent.*no such folder[\s\S]*Thr"),
    ("train", ("outer.lr= 1=2",), r"outer\.lr= 1=2: [\s\S]*Write KEY=VALUE without spaces"),
    ("evaluate", (), r"run\.dir is required"),
    ("evaluate", ("run.dir=.", "eval.episodes=1"), r"eval\.episodes=1: must be a whole number, at least 2"),
    ("compare", ("compare.seeds=[1,1]",), r"compare\.seeds=\[1, 1\]: a seed is listed twice"),
    (
        "compare",
        ("compare.variants=['inner.stps=1']",),
        r"compare\.variants, 'inner\.stps=1': inner\.stps=1: .*inner\.st",
    ),
    ("benchmark", ("bench.kind=all",), r"bench\.kind=all: must be one of peers, engines"),
    ("gradients", ("lesson=mamel",), r"lesson=mamel: must be one of all, create_graph"),
    ("verify", ("run.dtype=float16",), r"run\.dtype=float16: must be one of float64, float32"),
    ("verify", ("verify.steps=[1,-2]",), r"verify\.steps=\[1, -2\]: must be .*whole number.*at least 1"),
    ("train", ("model=custom", "model.target=nets.MyNet"), r"model\.target=nets\.MyNet: must be MODULE:NAME, as in"),
    ("train", ("--experimental-rerun=run.pickle",), r"--experimental-rerun=run\.pickle: a pickle.*give KEY=VALUE"),
]
IN_FILES: list[Case] = [
    ("train", "inner:\n  second_ordr: true",
     r"inner\.second_ordr=true: .*\(in experiment/mine\.yaml\).*second_order\?"),
    ("train", "inner:\n  second_order: maybe",
     r"inner\.second_order=maybe: must be true or false \(in experiment/mine"),
    ("train", "inner:\n  steps: 1.5", r"inner\.steps=1\.5: must be a whole number.*experiment/mine\.yaml"),
    ("train", "outer:\n  iterations: 0", r"outer\.iterations=0: must be a whole number, at least 1"),
    ("train", "task:\n  queries: 20", r"task\.shots=1 and task\.queries=20: together 21, and a class has 20"),
    ("train", "inner:\n  lr: 1\n steps: 2", r"a YAML file cannot be read: [\s\S]*mine\.yaml"),
    ("train", "inner:\n  engine: fast", r"inner\.engine=fast: must be one of unroll, checkpoint"),
    ("train", "inner:\n  lr: .nan", r"inner\.lr=nan: must be a number above 0"),
    ("train", "eval:\n  episodes: [1]", r"eval\.episodes=\[1\]: must be a whole number, at least 2"),
    ("benchmark", "bench:\n  repeats: 1", r"bench\.repeats=1: must be a whole number, at least 2"),
    ("benchmark", "bench:\n  limit: 3", r"bench\.limit=3: there is no such key.*memory_limit_mib"),
    ("compare", "compare:\n  target_accuracy: 80", r"compare\.target_accuracy=80: must be a number.*at most 1"),
    ("compare", "compare:\n  jobs: none", r"compare\.jobs=none: must be a whole number, at least 1"),
    (
        "train",
        f"inner: {{lr: !!python/object/apply:os.mkdir [{CREATED}]}}",
        r"cannot be read: [\s\S]*constructor[\s\S]*mine",
    ),
    (
        "train",
        "defaults: [override /model: custom]\nmodel: {target: nowhere:Net}",
        r"model\.target=nowhere:Net: there is no module nowhere; .*Start in the folder that holds it",
    ),
    ("train", "defaults: [override /data: custom]", r"data\.target is required: the class or function to call"),
    (
        "train",
        "defaults: [override /algorithm: custom]\nalgorithm: {target: 'a:b', options: 3}",
        r"algorithm\.options=3: must be names with values, as \{width: 32\} \(in experiment/mine\.yaml\)",
    ),
    ("train", "inner: {optimizer: custom}", r"inner\.optimizer=custom: inner\.optimizer_target=MODULE:NAME is req"),
    ("train", "inner: {optimizer_options: {eps: 1}}", r"inner\.optimizer=sgd: .*optimizer_options need inner\.opt"),
]
# fmt: on


@pytest.mark.fault(
    "configs with typos, wrong types, values out of range, in YAML and on the command line",
    "refused in under 3 s, key and remedy named, no data loaded",
)
@pytest.mark.parametrize("case", cases(enumerate([*ON_THE_COMMAND_LINE, *IN_FILES]), quick=[0, 14, 21, 35]))
def test_bad_config(
    case: tuple[int, Case],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    number, (script, arguments, message) = case
    if isinstance(arguments, str):
        (tmp_path / "conf" / "experiment").mkdir(parents=True)
        (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{arguments}\n")
        place = ("--config-dir", "conf") if number % 2 else ("hydra.searchpath=[conf]",)
        arguments = (*place, "experiment=mine")
    before = sorted(tmp_path.rglob("*"))
    ended, seconds = run(script, arguments, tmp_path)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2, f"exit code {ended.returncode}: {said}"
    assert re.search(message, ended.stderr), f"it does not name {message!r}: {said}"
    assert "Traceback" not in said, said
    assert "LOADED" not in said, f"it waited for {said}"
    assert sorted(tmp_path.rglob("*")) == before, f"it made {set(tmp_path.rglob('*')) - set(before)}"
    record_property("longest_cpu_s", seconds)
    if request.config.getoption("--faults-report", None):  # the default run holds no test to a time
        assert seconds < 3


def run(script: str, arguments: tuple[str, ...], folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command in a process; return it and the seconds of processor time that it took."""
    environment = {name: value for name, value in os.environ.items() if name not in ("METALEARN_DATA", "PYTHONPATH")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", RUN, str(REPO / "scripts" / f"{script}.py"), *arguments],
        cwd=folder,
        env=environment | {"METALEARN_CACHE": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
