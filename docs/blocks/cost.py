"""Time and memory: beside other libraries, by engine, beside other work, and of the checks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from docs.blocks.markdown import read, table

_SPEEDS = {
    "5way_1shot": "5-way 1-shot, 1 query, T = 32, K = 1",
    "20way_1shot": "20-way 1-shot, 1 query, T = 16, K = 5",
    "5way_1shot_15queries": "5-way 1-shot, 15 queries, T = 16, K = 5",
    "5way_1shot_narrow": "5-way 1-shot, T = 32, K = 1, 16 filters",
    "5way_5shot_max_pool": "5-way 5-shot, 15 queries, T = 4, K = 5, max-pooling",
    "5way_1shot_mlp": "5-way 1-shot, T = 32, K = 1, MLP",
    "5way_1shot_resnet12": "5-way 1-shot, 84 x 84, T = 2, K = 1, ResNet-12 of 16 filters",
}
_MAIN_SPEEDS = list(_SPEEDS)[:3]
_OTHERS = ("hand-written loop", "torch.func", "higher", "TorchOpt", "JAX")
_LIMIT = "over 4096"

# Label in the tables; engine, second order, task_chunk, whether checkpoints are sparse.
_ENGINES: dict[str, tuple[str, bool, int | None, bool]] = {
    "first order, all {} tasks": ("unroll", False, None, False),
    "`unroll`, all {} tasks": ("unroll", True, None, False),
    "`checkpoint`, all {} tasks": ("checkpoint", True, None, False),
    "`adjoint`, all {} tasks": ("adjoint", True, None, False),
    "`checkpoint`, `task_chunk=4`": ("checkpoint", True, 4, False),
    "**`adjoint`, `task_chunk=4`**": ("adjoint", True, 4, False),
    "`adjoint`, `task_chunk=4`, sparse checkpoints": ("adjoint", True, 4, True),
    "first order, one task at a time": ("unroll", False, 1, False),
    "`unroll`, one task at a time": ("unroll", True, 1, False),
    "`checkpoint`, one task at a time": ("checkpoint", True, 1, False),
    "`adjoint`, one task at a time": ("adjoint", True, 1, False),
    "`adjoint`, one task at a time, sparse checkpoints": ("adjoint", True, 1, True),
}


def speeds() -> str:
    """Return the speed of every method at every setting."""
    ours = ("`unroll`, ms", "speed", "plain", "`checkpoint`", "`adjoint`")
    head = ("setting", "order", *ours, "hand-written loop", *_OTHERS[1:], "GFLOP/s, % of the peak")
    methods = [("metalearn", engine) for engine in ("unroll, plain", "checkpoint", "adjoint")]
    methods += [(library, "") for library in _OTHERS]
    rows = []
    for setting, label in _SPEEDS.items():
        for order in ("second", "first"):
            of = _speeds_of(setting, order == "second")
            unroll = of["metalearn", "unroll"]
            times = "{:.0f} ({:.0f} to {:.0f})".format(unroll["median_ms"], *unroll["quartiles_ms"])
            found = (f"{of[method]['speed']:.2f}" if method in of else "-" for method in methods)
            rate = f"{unroll['gflops']:.0f}, {unroll['percent_of_peak']:.0f}%"
            rows.append((label, order, times, f"**{unroll['speed']:.2f}**", *found, rate))
    return table(head, rows)


def main_speeds() -> str:
    """Return the speed of the libraries at the published settings, in second order."""
    rows = []
    for setting in _MAIN_SPEEDS:
        of = _speeds_of(setting, second_order=True)
        others = (f"{of[library, '']['speed']:.2f}" for library in _OTHERS)
        rows.append((_SPEEDS[setting], f"**{of['metalearn', 'unroll']['speed']:.2f}**", "1", *others))
    return table(("setting, second order", "metalearn", "learn2learn", *_OTHERS), rows)


def _speeds_of(setting: str, second_order: bool) -> dict[tuple[str, str], dict[str, Any]]:
    rows = read("benchmark/peers.json")["settings"][setting]["rows"]
    return {(r["library"], r["engine"] or ""): r for r in rows if r["second_order"] == second_order}


def beside_other_work() -> str:
    """Say how long calls take where other processes hold both cores."""
    calls = read("benchmark/busy.json")["call_ms"]
    jax = calls["JAX, in turns with the others"]
    spans = [f"{min(ms):,} to {max(ms):,}" for ms in (*list(calls.values())[:3], jax)]
    return "{} ms without either, {} with the shorter wait, {} on one thread, JAX {}".format(*spans)


def training_beside_other_work() -> str:
    """Say how long a meta-step of a training takes there."""
    training = read("benchmark/busy.json")["training_ms"]
    return f"took {training['beside'][0]} ms, alone {min(training['alone'])} to {max(training['alone'])}"


def processes() -> str:
    """Say how several processes scale."""
    found = read("benchmark/scaling.json")
    of = {(r["processes"], r["threads"]): r["speed_up"] for r in found["rows"]}
    return (
        f"two processes of one thread take {of[2, 1]:.2f} times as many meta-steps a second as one, and one process of "
        f"two threads {of[1, 2]:.2f} times; the all-reduce of the {found['gradient_bytes'] / 1e6:.2f} MB gradient "
        f"takes {found['all_reduce_ms']:.2f} ms between processes"
    )


def memory_of_engines(setting: str) -> str:
    """Return peak memory by engine and number of inner steps."""
    tasks, steps = {"20way_1shot": (16, (1, 5, 10, 20, 50)), "20way_1shot_wide": (4, (1, 10, 50))}[setting]
    rows = engine_rows(setting)
    lines = []
    for label, key in _ENGINES.items():
        if any((*key, k) in rows for k in steps):
            ratio = rows.get((*key, 10), {}).get("ratio_to_unroll")
            memory = (_mib(rows.get((*key, k))) for k in steps)
            lines.append((label.format(tasks), *memory, f"{ratio:.2f}" if ratio else "-"))
    return table(("peak MiB", *(f"K = {k}" for k in steps), "time, K = 10"), lines)


def memory_headline() -> str:
    """Compare the memory of second order, four tasks at a time, with that of first order on all of them."""
    rows = engine_rows("20way_1shot")
    second, first = (_mib(rows[key]) for key in (("adjoint", True, 4, False, 10), ("unroll", False, None, False, 10)))
    return f"{second} MiB by `adjoint` at ten inner steps, and their first-order one {first} MiB"


def memory_with_more_queries() -> str:
    """Return peak memory at one and at ten inner steps, with 15 queries a class."""
    keys = [*list(_ENGINES.values())[:4], ("adjoint", True, 4, False)]
    lines = []
    for setting in ("5way_1shot", "5way_5shot"):
        rows = engine_rows(setting)
        cells = (f"{_mib(rows.get((*key, 1)))} / {_mib(rows.get((*key, 10)))}" for key in keys)
        lines.append((f"5-way {setting[5]}-shot, 15 queries", *cells))
    names = ("first order", "`unroll`", "`checkpoint`", "`adjoint`", "`adjoint`, `task_chunk=4`")
    return table(("peak MiB at K = 1 / 10, T = 16", *names), lines)


def engine_rows(setting: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the measurements by engine, order, tasks at a time, whether checkpoints are sparse, and inner steps."""
    name = setting if setting == "20way_1shot" else "benchmark"  # the first was measured once more, alone
    rows = read(f"engines/{name}.json")["settings"][setting]["rows"]
    return {(r["engine"], r["second_order"], r["task_chunk"], r["snapshot_every"] > 1, r["steps"]): r for r in rows}


def _mib(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return _LIMIT if found["peak_mib"] is None else f"{found['peak_mib']:.0f}"


def verification() -> str:
    """Say how many comparisons ``scripts/verify.py`` makes, and the largest errors."""
    report = read("verify-float64.json")
    errors: dict[bool, list[float]] = defaultdict(list)
    for compared in report["comparisons"]:
        errors[compared["reference"] == "differences"].append(compared["error"])
    return (
        f"in float64: {len(report['comparisons'])} comparisons, the largest error "
        f"{max(errors[False]):.0e} against engines, the loop, libraries and the adapted weights, and "
        f"{max(errors[True]):.0e} against differences"
    )


def faults() -> str:
    """Return what was brought about on purpose, and in how many tries everything held."""
    rows = read("faults.json")["rows"].values()
    return table(
        ("fault", "what must hold", "held"),
        ((r["fault"], r["must_hold"], f"{r['held']:,} of {r['tries']:,}") for r in rows),
    )


def checkpoint_share() -> str:
    """Say what checkpoints take of a training's time."""
    return f"{read('faults.json')['rows']['checkpoint_cost']['measured']['share_of_training_time']:.2%}"


def float32_distances() -> str:
    """Say how much farther from float64 the meta-gradient of ``unroll`` is than that of a plain loop, in float32."""
    found = read("float32.json")
    times = sorted(r["times_plain"] for r in found["rows"] if r["who"] == "metalearn unroll")
    return (
        f"in the median of {len(found['seeds'])} seeds {times[0]:.1f} to {times[-2]:.1f} times as far in "
        f"{len(times) - 1} of {len(times)} settings, and {times[-1]:.1f} times in one"
    )
