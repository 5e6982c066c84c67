"""The report of a comparison: its content, and that user text cannot break it."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metalearn.commands.compare.plots import PLOTS
from metalearn.commands.compare.report import ReportLogger, escape, write_report
from metalearn.commands.compare.results import Results, TimeToAccuracy
from metalearn.commands.compare.tables import (
    headline,
    memory_rows,
    per_step_rows,
    run_rows,
    time_rows,
    variant_rows,
)
from metalearn.training.evaluation import MeanCI
from metalearn.training.tracking.event_files import EVENT_FILES
from tests.commands.compare.factories import broken_variant, cost_rows, curve, difference, results, two_orders, variant

NASTY = "<script>alert(1)</script>|a|b\n\n# `c` *d* __e__ [f](http://g) ![h](http://i) ~~j~~ &amp; \\"
_VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Tags and text of a page; fails if tags are not closed in the order in which they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.text.setdefault(tag, []).append(data)

    def of(self, tag: str) -> str:
        """Return all text within a tag, on one line."""
        return " ".join("".join(self.text.get(tag, [])).split())


def page(given: Results, folder: Path) -> Page:
    return Page(write_report(given, folder).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a report on two orders; tests only read its folder."""
    folder = tmp_path_factory.mktemp("reports") / "a folder"
    write_report(two_orders(), folder)
    return folder


COSTS = (  # 1500 / 500 ms and 800 / 90 MiB, measured in turns at K = 5
    "; a meta-gradient of second order costs 3.00 times the time (1500 against 500 ms) and 8.89 times the peak memory "
    "(800 against 90.0 MiB) of first order."
)


@pytest.mark.parametrize(
    ("per_seed", "ci95", "sentence"),
    [
        (
            (0.010, 0.012, 0.014),
            0.005,
            "Second order buys 1.20 ± 0.50 percentage points of test accuracy over first order "
            "(95% interval over 3 seeds and their tasks)",
        ),
        (
            (-0.010, -0.014),
            0.005,
            "first_order is ahead of second_order by 1.20 ± 0.50 percentage points of test accuracy "
            "(95% interval over 2 seeds and their tasks)",
        ),
        (
            (0.003,),
            0.005,
            "There is no clear difference between second_order and first_order: +0.30 ± 0.50 percentage points of "
            "test accuracy (95% interval over the test tasks only, as there is one seed), which includes zero",
        ),
        ((0.0, 0.0), 0.0, "second_order and first_order are equal on every test task"),
    ],
)
def test_headline_is_one_sentence_on_gain_and_cost(per_seed: tuple[float, ...], ci95: float, sentence: str) -> None:
    assert headline(two_orders(per_seed, ci95)) == [sentence + COSTS]


def test_headline_mentions_different_tasks_when_unpaired() -> None:
    given = two_orders()
    apart = dataclasses.replace(given, differences=[dataclasses.replace(given.differences[0], paired=False)])
    assert "they were tested on different tasks" in headline(apart)[0]


def test_headline_of_other_variants_gives_costs_of_runs_and_no_times_of_runs_that_shared_the_machine() -> None:
    one, other = variant("one", ms=48.0, mib=54.0), variant("other", ms=24.0, mib=36.0)
    given = results([one, other], [difference(one, other, (0.010, 0.012), 0.005)])
    alone = "; a meta-step of one costs 2.00 times the time (48.0 against 24.0 ms) and 1.50 times the peak memory"
    shared = "; a meta-step of one costs 1.50 times the peak memory"
    end = " (54.0 against 36.0 MiB) of other."
    assert headline(given)[0].endswith(f"tasks){alone}{end}")
    assert headline(dataclasses.replace(given, runs_at_a_time=2))[0].endswith(f"tasks){shared}{end}")


def test_headline_omits_costs_that_were_not_measured() -> None:
    given = two_orders()
    bare = [dataclasses.replace(each, meta_step_ms=None, peak_mib=None) for each in given.variants]
    assert headline(dataclasses.replace(given, variants=bare, cost=[]))[0].endswith("their tasks).")
    other_steps = dataclasses.replace(given, inner_steps=3)
    assert "a meta-step of second order costs 2.00 times" in headline(other_steps)[0], "it was not measured at 3"
    over_limit = dataclasses.replace(given, cost=cost_rows(limit_at=5))
    assert "a meta-step of second order costs 2.00 times" in headline(over_limit)[0]


def test_headline_names_the_best_of_several_variants() -> None:
    variants = [variant(name, 0.9 + i / 100) for i, name in enumerate("abcd")]
    gaps = ((-0.01, 0.02), (-0.02, 0.01), (0.03, 0.01))  # without a clear difference, clearly ahead, clearly behind
    given = results(
        variants, [difference(variants[0], v, (m,), h) for v, (m, h) in zip(variants[1:], gaps, strict=True)]
    )
    assert headline(given) == [
        "d has the highest test accuracy of 4 variants, 93.00% ± 0.90%; against a, the first, 1 of the others is "
        "clearly ahead, 1 clearly behind, and 1 without a clear difference (95% intervals)."
    ]


def test_headline_lists_failed_and_unfinished_runs() -> None:
    given = results([variant("second_order"), broken_variant("first_order")])
    sentences = headline(given)
    assert sentences[0].startswith("second_order reaches 98.00% ± 0.90%")
    assert "1 of 5 runs failed: first_order seed 0." in sentences
    assert "1 of 5 runs is not finished: first_order seed 1." in sentences


def test_report_lists_reasons_when_nothing_is_finished(tmp_path: Path) -> None:
    given = results([broken_variant("second_order"), broken_variant("first_order")])
    assert headline(given)[0] == "No run is finished, so there is nothing to compare yet."
    found = page(given, tmp_path)
    assert "the loss is not finite" in found.of("blockquote")
    assert "second_order-seed1" in found.of("blockquote"), "the unfinished one"
    assert "svg" not in [tag for tag, _ in found.tags]
    assert variant_rows(given)[1][0] == ["second_order", "-", "-", "-", "-", "-", "-", "0 of 2"]


def test_variant_rows() -> None:
    header, rows = variant_rows(two_orders())
    assert dict(zip(header, rows[0], strict=True)) == {
        "variant": "second_order",
        "test accuracy": "98.00% ± 0.90%",
        "non-transductive": "94.00% ± 1.20%",
        "ms per meta-step": "48.0",
        "peak MiB": "54.0",
        "training time": "48.0 s",
        "time to 95.0%": "28.8 s, 600 steps",
        "finished seeds": "3 of 3",
    }
    at_first = dataclasses.replace(variant("fast"), curve=curve(0.98, ms=48.0, band=0.01)[12:])  # from step 600 on
    assert variant_rows(results([at_first]))[1][0][6] == "at most 28.8 s, 600 steps"
    once = dataclasses.replace(variant("once"), time_to=TimeToAccuracy(28.8, 600, 1))
    assert variant_rows(results([once]))[1][0][6] == "28.8 s in 1 of 3 seeds, 600 steps"
    slow = dataclasses.replace(variant("slow"), time_to=None)
    assert variant_rows(results([slow]))[1][0][6] == "not reached"
    assert len(variant_rows(results([slow], target=None))[0]) == 7


def test_rows_of_steps_costs_and_runs() -> None:
    given = two_orders()
    short = dataclasses.replace(given.variants[1], per_step=[MeanCI(0.2, 0.01), MeanCI(0.9, 0.01)])
    _, rows = per_step_rows(dataclasses.replace(given, variants=[given.variants[0], short]))
    assert rows[1] == ["first_order", "20.00% ± 1.00%", "90.00% ± 1.00%", "-", "-"]
    header, memory = memory_rows(dataclasses.replace(given, cost=cost_rows(limit_at=20)))
    assert header == ["inner steps K", "1", "5", "10", "20"]
    assert memory[1] == ["unroll", "274", "800", "1456", "over 4096"]
    assert time_rows(given)[1][0] == ["first order", "100", "500", "1000", "2000"]
    assert run_rows(given)[1][0][:5] == ["second_order-seed0", "0", "finished", "97.60% ± 0.50%", "93.60% ± 0.80%"]


def test_page_loads_nothing_from_outside(folder: Path) -> None:
    found = Page((folder / "report.html").read_text())
    layouts = [attributes["class"] for tag, attributes in found.tags if tag == "svg"]
    assert layouts == ["wide", "narrow"] * len(PLOTS)
    links = [value or "" for _, given in found.tags for name, value in given.items() if "href" in name]
    assert all(link.startswith("#") for link in links)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "img", "image"}
    assert "url(" not in found.of("style")
    assert "@import" not in found.of("style")
    assert found.of("title") == "omniglot, 5-way 1-shot: second_order against first_order"


def test_page_contains_every_part(folder: Path) -> None:
    found = Page((folder / "report.html").read_text())
    assert all(sentence in found.of("p") for sentence in headline(two_orders()))
    for caption in PLOTS.values():
        assert caption.text in found.of("p")
    assert all(caption.title in found.of("h2") for name, caption in PLOTS.items() if name != "overview")
    assert "+1.20 ± 0.50" in found.of("td")
    assert "0: +1.00, 1: +1.20, 2: +1.40" in found.of("td")
    assert "python scripts/compare.py data=omniglot" in found.of("pre")
    assert "ways: 5 inner: lr: 0.4" in found.of("details"), "the part behind a blank line as well"
    assert f"tensorboard --logdir '{folder}'" in found.of("pre")
    assert "some CPU" in found.of("li")


def test_gain_and_cost_come_before_any_table(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    places = [text.index(part) for part in ("Second order buys", "plots/overview.png", "\n| ")]
    assert places == sorted(places)


def test_markdown_links_existing_plots(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    for name, caption in PLOTS.items():
        assert f"![{caption.title}](plots/{name}.png)" in text
        assert text.count(caption.text) == 1
        with Image.open(folder / "plots" / f"{name}.png") as plot:
            assert plot.width == pytest.approx(1350, abs=2)
    expected = {f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")}
    assert {path.name for path in (folder / "plots").iterdir()} == expected


def test_user_text_adds_no_markup(tmp_path: Path) -> None:
    given = results([variant(NASTY), broken_variant("first_order|x", NASTY)])
    given = dataclasses.replace(given, title=NASTY, command=NASTY, config=NASTY, machine={NASTY: NASTY})
    found = page(given, tmp_path)
    assert {tag for tag, _ in found.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "blockquote", "ul", "li"),
        *("table", "thead", "tbody", "tr", "th", "td", "strong", "pre", "details", "summary"),
        *("svg", "defs", "g", "path", "text", "tspan", "use", "clippath", "rect"),
    }
    shown = " ".join(NASTY.split())
    for tag in ("title", "h1", "blockquote", "td", "pre", "details", "li", "p"):
        assert shown in found.of(tag), tag


def test_escape_returns_one_printable_line() -> None:
    assert escape("a\x1b[31m\n\n# b") == r"a \[31m # b"


def test_pipe_in_name_adds_no_column(tmp_path: Path) -> None:
    write_report(results([variant("a|b"), broken_variant("c\\|d")]), tmp_path)
    found = Page((tmp_path / "report.html").read_text())
    assert "a|b" in found.of("td")
    assert "c\\|d" in found.of("td")
    lines = (tmp_path / "report.md").read_text().splitlines()
    start = lines.index("## Variants") + 2
    assert {line.count("|") for line in lines[start : start + 4]} == {9}, "header, rule and two rows of eight columns"


def test_image_in_user_text_stays_text(tmp_path: Path) -> None:
    command = '<img alt="x" src="plots/accuracy.png"'
    found = page(dataclasses.replace(results([variant("second_order")]), command=command), tmp_path)
    assert command in found.of("pre")


def test_report_replaces_earlier_one(tmp_path: Path) -> None:
    given = two_orders()
    write_report(given, tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    assert (tmp_path / "plots" / "cost.svg").exists()
    (tmp_path / "plots" / "notes.txt").write_text("of someone else")
    write_report(dataclasses.replace(given, cost=[], differences=[]), tmp_path)
    left = {path.name for path in (tmp_path / "plots").iterdir()}
    assert not left & {"cost.png", "cost.svg", "overview.png", "overview.svg"}
    assert {"accuracy.png", "accuracy.svg", "notes.txt"} <= left
    assert "plots/cost.png" not in (tmp_path / "report.md").read_text()
    write_report(given, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first, "the same results give the same page"


def test_event_file_of_an_earlier_report_stays_until_there_is_another(tmp_path: Path) -> None:
    class PowerCut(BaseException):
        pass

    def cut(*args: object) -> None:
        raise PowerCut

    with ReportLogger(tmp_path) as tensorboard:
        tensorboard.log_report("old", {}, runs=[])
    (earlier,) = tmp_path.glob(EVENT_FILES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReportLogger, "log_text", cut)
        with pytest.raises(PowerCut), ReportLogger(tmp_path) as tensorboard:
            tensorboard.log_report("new", {}, runs=[])
    assert earlier.exists()
    with ReportLogger(tmp_path) as tensorboard:
        tensorboard.log_report("new", {}, runs=[])
    (latest,) = tmp_path.glob(EVENT_FILES)
    assert latest != earlier


def test_event_file_replaces_an_earlier_one(tmp_path: Path) -> None:
    image = np.full((4, 6, 3), 200, dtype=np.uint8)
    for text, names in (("| old |\n|---|", ["accuracy", "gone"]), ("| new |\n|---|", ["accuracy"])):
        with ReportLogger(tmp_path) as tensorboard:
            tensorboard.log_report(text, dict.fromkeys(names, image), runs=[{"inner.lr": 0.1}])
    (_,) = tmp_path.glob(EVENT_FILES)
    events = EventAccumulator(str(tmp_path)).Reload()
    (text_event,) = events.Tensors("report/text_summary")
    assert text_event.tensor_proto.string_val[0].decode() == "| new |\n|---|"
    assert events.Tags()["images"] == ["report/accuracy"]
    (logged,) = events.Images("report/accuracy")
    assert (logged.height, logged.width) == (4, 6)
