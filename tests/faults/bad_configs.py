"""Configurations that cannot be run, or that would run a stranger's code, as users and strangers would write them."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO
from tests.faults.suite import Row

_RUN = """
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


@dataclass(frozen=True)
class Case:
    """A configuration, and what must be said of it.

    Args:
        script: of ``scripts/``.
        given: the command line, or the experiment file below its ``@package`` line.
        named: a regular expression for the message: the key, the value and the remedy.
    """

    script: str
    given: str | tuple[str, ...]
    named: str


_MADE = "made-by-a-stranger"
_ON_THE_COMMAND_LINE = [
    Case(
        "train", ("inner.second_ordr=true",), r"inner\.second_ordr=true: there is no such key\. Did you mean inner\.sec"
    ),
    Case("train", ("second_order=false",), r"second_order=false: .*Did you mean inner\.second_order\?"),
    Case("train", ("inner.steps=many",), r"inner\.steps=many: must be a whole number, at least 0"),
    Case("train", ("inner.lr=-1",), r"inner\.lr=-1: must be a number above 0"),
    Case("train", ("task.ways=2000",), r"task\.ways=2000: at most 100"),
    Case("train", ("model=resnet",), r"Could not find 'model/resnet'[\s\S]*conv4"),
    Case("train", ("inner.engine=fast",), r"inner\.engine=fast: must be one of unroll, checkpoint, adjoint"),
    Case("train", ("run.device=gpu",), r"run\.device=gpu: must be auto, cpu, cuda or cuda:N"),
    Case("train", ("--multirun", "inner.steps=1,2,-3"), r"inner\.steps=-3: must be a whole number, at least 0"),
    Case(
        "train", ("data.root=/nonexistent", "data.fallback=null"), r"data\.root=/nonexistent.*no such folder[\s\S]*Thr"
    ),
    Case("train", ("outer.lr= 1=2",), r"outer\.lr= 1=2: [\s\S]*Write KEY=VALUE without spaces"),
    Case("evaluate", (), r"run\.dir is required"),
    Case("evaluate", ("run.dir=.", "eval.episodes=1"), r"eval\.episodes=1: must be a whole number, at least 2"),
    Case("compare", ("compare.seeds=[1,1]",), r"compare\.seeds=\[1, 1\]: a seed stands there twice"),
    Case(
        "compare",
        ("compare.variants=['inner.stps=1']",),
        r"compare\.variants, 'inner\.stps=1': inner\.stps=1: .*inner\.st",
    ),
    Case("benchmark", ("bench.kind=all",), r"bench\.kind=all: must be one of peers, engines"),
    Case("gradients", ("lesson=mamel",), r"lesson=mamel: must be one of all, create_graph"),
    Case("verify", ("run.dtype=float16",), r"run\.dtype=float16: must be one of float64, float32"),
    Case("verify", ("verify.steps=[1,-2]",), r"verify\.steps=\[1, -2\]: must be .*whole number.*at least 1"),
    Case(
        "gradients",
        (f"+hydra.callbacks.x={{_target_:os.mkdir,path:{_MADE}}}",),
        r"callbacks\.x\._target_=os\.mkdir: .*Rem",
    ),
    Case("train", ("--experimental-rerun=run.pickle",), r"--experimental-rerun=run\.pickle: a pickle.*Give KEY=VALUE"),
]
_IN_FILES = [
    Case(
        "train",
        "inner:\n  second_ordr: true",
        r"inner\.second_ordr=true: .*\(in experiment/mine\.yaml\).*second_order\?",
    ),
    Case(
        "train",
        "inner:\n  second_order: maybe",
        r"inner\.second_order=maybe: must be true or false \(in experiment/mine",
    ),
    Case("train", "inner:\n  steps: 1.5", r"inner\.steps=1\.5: must be a whole number.*experiment/mine\.yaml"),
    Case("train", "outer:\n  iterations: 0", r"outer\.iterations=0: must be a whole number, at least 1"),
    Case(
        "train",
        "task:\n  queries: 20",
        r"task\.shots=1 and task\.queries=20: together 21, and a class has 20",
    ),
    Case("train", "inner:\n  lr: 1\n steps: 2", r"a YAML file cannot be read: [\s\S]*mine\.yaml"),
    Case("train", "inner:\n  engine: fast", r"inner\.engine=fast: must be one of unroll, checkpoint"),
    Case("train", "inner:\n  lr: .nan", r"inner\.lr=nan: must be a number above 0"),
    Case("train", "eval:\n  episodes: [1]", r"eval\.episodes=\[1\]: must be a whole number, at least 2"),
    Case("benchmark", "bench:\n  repeats: 1", r"bench\.repeats=1: must be a whole number, at least 2"),
    Case("benchmark", "bench:\n  limit: 3", r"bench\.limit=3: there is no such key.*memory_limit_mib"),
    Case("compare", "compare:\n  target_accuracy: 80", r"compare\.target_accuracy=80: must be a number.*at most 1"),
    Case("compare", "compare:\n  jobs: none", r"compare\.jobs=none: must be a whole number, at least 1"),
    Case(
        "train",
        f"inner: {{lr: !!python/object/apply:os.mkdir [{_MADE}]}}",
        r"cannot be read: [\s\S]*constructor[\s\S]*mine",
    ),
    Case(
        "train",
        f"hydra: {{callbacks: {{x: {{_target_: os.mkdir, path: {_MADE}}}}}}}",
        r"callbacks\.x\._target_=os\.mkdir",
    ),
    Case(
        "train",
        f"hydra: {{hydra_logging: {{version: 1, root: {{}}, filters: {{x: {{(): os.mkdir, path: {_MADE}}}}}}}}}",
        r"hydra_logging\.filters\.x\.\(\)=os\.mkdir: .*Remove it",
    ),
    Case(
        "train", f"hydra: {{job_logging: {{handlers: {{file: {{filename: {_MADE}}}}}}}}}", rf"filename={_MADE}: must be"
    ),
    Case("compare", "hydra: {job: {env_set: {PYTHONPATH: .}}}", r"env_set\.PYTHONPATH=\.: .*Set them in the shell"),
    Case("train", "hydra: {launcher: {_target_: os.mkdir}}", r"hydra\.launcher\._target_=os\.mkdir: .*Remove it"),
]
_CASES = [*_ON_THE_COMMAND_LINE, *_IN_FILES]


def _attempt(i: int, folder: Path, shared: Path) -> dict[str, float]:
    case = _CASES[i]
    if isinstance(case.given, str):
        (folder / "conf" / "experiment").mkdir(parents=True)
        (folder / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{case.given}\n")
        place = ("--config-dir", "conf") if i % 2 else ("hydra.searchpath=[conf]",)
        arguments = (*place, "experiment=mine")
    else:
        arguments = case.given
    before = sorted(folder.rglob("*"))
    ended, seconds = _run(case.script, arguments, folder)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2, f"exit code {ended.returncode}: {said}"
    assert re.search(case.named, ended.stderr), f"it does not name {case.named!r}: {said}"
    assert "Traceback" not in said, said
    assert "LOADED" not in said, f"it waited for {said}"
    assert sorted(folder.rglob("*")) == before, f"it made {set(folder.rglob('*')) - set(before)}"
    return {"longest_cpu_s": seconds}


def _run(script: str, arguments: tuple[str, ...], folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command in a process of its own, and the seconds that it computed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("METALEARN_DATA", "PYTHONPATH")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", _RUN, str(REPO / "scripts" / f"{script}.py"), *arguments],
        cwd=folder,
        env=environment | {"METALEARN_CACHE": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


BAD_CONFIGS = Row(
    name="bad_configs",
    fault="configs with typos, wrong types, values out of range, in YAML and on the command line",
    must_hold="refused in under 3 s, key and remedy named, no data loaded",
    tries=len(_CASES),
    attempt=_attempt,
    short=(0, 14, 21, 35),
    seconds=0.8,
    limits={"longest_cpu_s": 3.0},  # of the process, so that what else the machine does is not counted
)
