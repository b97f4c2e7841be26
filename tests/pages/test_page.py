"""The page kit: safe, self-contained, and small."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from sslzoo.pages.page import (
    Chart,
    Code,
    Level,
    Line,
    Rows,
    Scatter,
    Section,
    Table,
    Text,
    Thumbnail,
    embedded,
    render,
    thin,
)

NASTY = '</script><script>alert(1)</script>&"<!--'


class Reader(HTMLParser):
    """Elements and texts as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.starts: list[str] = []
        self.addresses: list[str] = []
        self.charts, self.within = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.within = dict(attrs).get("id") or ""

    def handle_data(self, data: str) -> None:
        if self.within == "charts":
            self.charts += data

    def handle_endtag(self, tag: str) -> None:
        self.within = ""


def page_of(*blocks: object) -> str:
    return render("title", "subtitle", [Section(title="section", blocks=blocks)])  # type: ignore[arg-type]


def test_names_cannot_add_elements() -> None:
    chart = Chart(title=NASTY, lines=[Line(label=NASTY, x=[1], y=[2.0])], levels=[Level(label=NASTY, y=1.0)])
    page = page_of(
        chart,
        Table(head=[NASTY], rows=[[NASTY, NASTY]], caption=NASTY),
        Text(NASTY),
        Code(title=NASTY, text=NASTY),
        Scatter(title=NASTY, x=[0.0], y=[0.0], group=[0], names=[NASTY]),
        Rows(title=NASTY, rows=[[Thumbnail(uri=NASTY, text=NASTY)]]),
    )
    assert "alert(1)</script>" not in page
    reader = Reader(page)
    assert reader.starts.count("script") == 3
    assert json.loads(reader.charts)[0]["series"][0]["label"] == NASTY


def test_a_page_needs_nothing_from_outside() -> None:
    page = page_of(Chart(title="t", lines=[Line(label="l", x=[1, 2], y=[1.0, 2.0])]))
    assert "default-src 'none'" in page
    assert all(address.startswith(("data:", "#")) for address in Reader(page).addresses)
    assert not re.search(r"@import|url\(", page)
    assert len(page) < 80_000, "what every page carries: uPlot, its licence, style and script"
    assert "Permission is hereby granted" in page


def test_numbers_that_are_not_finite_are_gaps() -> None:
    page = page_of(
        Chart(title="t", lines=[Line(label="l", x=[1, 2, 3], y=[1.0, math.nan, math.inf])], log_scale=True)
    )
    (chart,) = json.loads(Reader(page).charts)
    assert chart["series"][0]["y"] == [1.0, None, None]
    assert chart["log"]
    with pytest.raises(ValueError, match="Out of range float"):
        embedded(math.nan)


def test_curves_with_other_steps_share_a_chart() -> None:
    lines = [
        Line(label="a", x=[1, 3], y=[1.0, 3.0]),
        Line(label="b", x=[2, 3], y=[0.0, 4.0], low=[0, 1], high=[1, 5]),
    ]
    (chart,) = json.loads(Reader(page_of(Chart(title="t", lines=lines, log_scale=True))).charts)
    assert chart["x"] == [1, 2, 3]
    assert [s["y"] for s in chart["series"]] == [[1.0, None, 3.0], [None, 0.0, 4.0]]
    assert chart["series"][1]["high"] == [None, 1.0, 5.0]
    assert not chart["log"], "0 has no logarithm"


def test_long_curves_become_means() -> None:
    x, y, band = thin(list(range(1, 11)), [float(v) for v in range(10)], (), points=4)
    assert (x, y, band) == ([3, 6, 9, 10], [1.0, 4.0, 7.0, 9.0], ())
    assert thin([1, 2], [5.0, 6.0], points=2) == ([1, 2], [5.0, 6.0])
