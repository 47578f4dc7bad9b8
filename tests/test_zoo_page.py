"""docs/zoo.md: every configuration is planned, without a download, and the page says what the plans and the files say."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
from zoo_sizes import SIZES, Size

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import make_zoo

PATHS = {path.stem: path for path in make_zoo.paths()}
AGAIN = "run `python docs/make_zoo.py`"


@cache
def entry(stem: str) -> make_zoo.Entry:
    return make_zoo.entry(PATHS[stem])


@pytest.mark.parametrize("stem", PATHS)
def test_a_configuration_is_planned_and_stands_on_the_page(stem: str) -> None:
    page = make_zoo.PAGE.read_text(encoding="utf-8")
    one = entry(stem)
    assert one.header.about, f"{stem}.yaml needs a comment at its head that says what it is"
    assert make_zoo.row(one) in page, AGAIN
    assert make_zoo.block(one) in page, AGAIN


@pytest.mark.parametrize("fact", SIZES, ids=lambda fact: f"{fact.config}-{fact.part}")
def test_published_sizes(fact: Size) -> None:
    here = make_zoo.size_here(entry(fact.config), fact)
    close = abs(here / fact.published - 1) <= 0.01
    assert close != bool(fact.differs), f"{here:,} here, {fact.published:,} published"


def test_the_page_is_what_would_be_written() -> None:
    entries = [entry(path.stem) for path in make_zoo.paths()]
    assert make_zoo.PAGE.read_text(encoding="utf-8") == make_zoo.page(entries), AGAIN
