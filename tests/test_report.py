"""The page of a report, and its plots: whole, safe, the same every time, and told in words."""

import re
from xml.etree import ElementTree

import pytest

from retinue.lab.base import Chart, Column, Series, lines_by
from retinue.lab.drawing import describe, draw
from retinue.lab.page import Figure, Report, Section, Table, page
from retinue.lab.tables import cell

ROWS = [
    {"method": "one", "share": 20, "loss": 0.5, "low": 0.4, "high": 0.7},
    {"method": "two", "share": 20, "loss": None},
    {"method": "one", "share": 40, "loss": 0.25, "low": 0.25, "high": 0.25},
]
LINES = Chart(
    "Loss", "share, %", "nats", lines_by(ROWS, "method", "share", "loss", ("low", "high"))
)
BARS = Chart("Parts", "what", "MiB", [Series("a", ["x\ny", "z"], [1, 2])], kind="bars")
STACK = Chart("Parts", "what", "MiB", [Series("a", ["x"], [1]), Series("b", ["x"], [2])], "stacked")


def report(**fields: object) -> Report:
    section = {"name": "first", "title": "A <b>title</b>", "claim": "x < y", "found": "z & w"}
    sections = [Section(**(section | fields))]  # type: ignore[arg-type]
    return Report("Title", "Lead", "They", "We", [("model", "a <model>")], sections, ["A note."])


def test_lines_are_made_of_rows() -> None:
    (line,) = LINES.series
    assert (line.label, line.x, line.y) == ("one", [20, 40], [0.5, 0.25])
    assert (line.low, line.high) == ([0.4, 0.25], [0.7, 0.25])


def test_a_cell_has_its_interval_below() -> None:
    column = Column("loss", "loss", "+.2f", "low", "high")
    assert [cell(column, row) for row in ROWS] == ["+0.50\n+0.40 to +0.70", "", "+0.25"]
    assert cell(Column("loss", "size", "bytes"), {"loss": 3 << 20}) == "3 MiB"
    assert cell(Column("method", "method"), ROWS[0]) == "one"


def test_the_page_is_whole_and_safe() -> None:
    table = Table(["name", "value"], [["<i>", "1\n0 to 2"]], [False, True])
    text = page(report(tables=[table], figures=[Figure("<svg></svg>", "A caption")]))
    assert text.startswith("<!DOCTYPE html>")
    for escaped in ("A &lt;b&gt;title", "x &lt; y", "z &amp; w", "a &lt;model&gt;", "&lt;i&gt;"):
        assert escaped in text
    assert '<td class="number">1<small>0 to 2</small></td>' in text
    assert "<figcaption>A caption</figcaption>" in text
    assert "A note." in text
    assert text.count("z &amp; w") == 2  # in the summary and in its section
    ElementTree.fromstring(re.sub(r"<(meta|link)[^>]*>", "", text.split("\n", 1)[1]))


@pytest.mark.parametrize("chart", [LINES, BARS, STACK], ids=["lines", "bars", "stacked"])
def test_plots_are_the_same_every_time(chart: Chart) -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` is not installed")
    svg = draw(chart, "part")
    assert svg == draw(chart, "part")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == describe(chart)
    assert "width" not in root.attrib
    assert "height" not in root.attrib
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids
    assert all(name.startswith("part-") for name in ids)
    known = re.findall(r'(?:url\(#|href="#)([^")]*)', svg)
    assert known
    assert set(known) <= set(ids)


def test_a_page_asks_nothing_of_the_network() -> None:
    pytest.importorskip("matplotlib", reason="the extra `reproduce` is not installed")
    text = page(report(figures=[Figure(draw(LINES, "a"), "A caption")]))
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"\w+://[^\"'\s<]*", text)) <= names
    assert not re.search(r'(?:src|<link[^>]*href)="(?!data:,")', text)
    assert "@import" not in text


def test_plots_are_told_in_words() -> None:
    assert describe(LINES) == "Loss: nats over share, %. one: 20: 0.5, 40: 0.25."
    assert "x y: 1, z: 2" in describe(BARS)
