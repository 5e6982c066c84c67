"""Tables and numbers of the pages are of the committed results: ``python -m docs.blocks`` would change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from docs.blocks.markdown import ROOT
from docs.blocks.overview import PICTURE, data_digest
from docs.blocks.pages import PAGES, blocks, filled

HERE = Path("page.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text, page) == text, "run python -m docs.blocks"


def test_overview_is_drawn_from_the_committed_results() -> None:
    with Image.open(PICTURE) as picture:
        assert picture.info["Source"] == data_digest(), "run python -m docs.blocks.overview"


def test_every_block_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    unused = [name for name in blocks() if f"<!-- {name}" not in text]
    assert unused == ["measured_accuracy"], "which is a part of others"


def test_typed_number_is_replaced() -> None:
    inside, below = (
        "<!-- checkpoint_share -->0.01%<!-- /checkpoint_share -->",
        "<!-- lessons -->\nmany\n<!-- /lessons -->",
    )
    page = f"a {inside} b\n{below}\n"
    written = filled(page, HERE)
    assert "0.01%" not in written
    assert "many" not in written
    assert filled(written, HERE) == written
    assert written.startswith("a <!-- checkpoint_share -->")
    assert written.endswith("\n<!-- /lessons -->\n")


@pytest.mark.parametrize("text", ["<!-- speeds -->", "<!-- /speeds -->", "<!-- speeds --> <!-- /speed -->"])
def test_half_of_a_block_raises(text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md: <!-- .*this mark has no other end"):
        filled(text, HERE)


def test_unknown_block_raises() -> None:
    with pytest.raises(ValueError, match=r"page\.md: .*nothing writes this block; docs/blocks/ has \['algorithm'"):
        filled("<!-- spees -->\n<!-- /spees -->", HERE)
