"""A page of findings: title, setting, and sections with tables and plots, in one HTML file.

It asks nothing of the network, reads on a phone, prints, and says in words what its plots show. It
knows no experiment: who has findings fills these records.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WORDS = 28  # characters of a cell that is broken into lines


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as they are to be read; `numeric` columns stand to the right.

    A second line in a cell is written in small. Without a caption it is called by its size.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot: an SVG element and its caption."""

    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """One question: what others claim, if they do, what was found, and on what that rests."""

    name: str  # an anchor
    title: str
    claim: str
    found: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """The page. setting: pairs of a word and its value."""

    title: str
    lead: str
    claim_heading: str
    found_heading: str
    setting: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    notes: Sequence[str] = ()


def page(report: Report) -> str:
    """The whole HTML document."""
    body = [
        f"<header><h1>{escape(report.title)}</h1>",
        f'<p class="lead">{escape(report.lead)}</p></header>',
        _setting(report.setting),
        *[f'<p class="note">{_prose(note)}</p>' for note in report.notes],
        _contents(report),
        *[_section(number, section, report) for number, section in enumerate(report.sections, 1)],
    ]
    return _PAGE.format(title=escape(report.title), style=_STYLE, body="\n".join(body))


def _prose(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _setting(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(word)}</dt><dd>{escape(value)}</dd>" for word, value in pairs)
    return f'<dl class="setting">{rows}</dl>'


def _contents(report: Report) -> str:
    """All questions and answers at once."""
    rows = "".join(
        f'<li><a href="#{escape(section.name)}">{escape(section.title)}</a>'
        f"<p>{_prose(section.found)}</p></li>"
        for section in report.sections
    )
    return f'<nav aria-label="{escape(report.found_heading)}"><ol>{rows}</ol></nav>'


def _section(number: int, section: Section, report: Report) -> str:
    figures = "".join(
        f"<figure>{figure.svg}<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in section.figures
    )
    notes = "".join(f'<p class="note">{_prose(note)}</p>' for note in section.notes)
    return (
        f'<section id="{escape(section.name)}">'
        f"<h2><span>{number}</span> {escape(section.title)}</h2>"
        f"{_both(section, report)}"
        f'<div class="figures">{figures}</div>'
        f"{''.join(map(_table, section.tables))}{notes}</section>"
    )


def _both(section: Section, report: Report) -> str:
    if not section.claim:
        return f'<p class="found">{_prose(section.found)}</p>'
    claim = _said(report.claim_heading, section.claim)
    return f'<div class="both">{claim}{_said(report.found_heading, section.found)}</div>'


def _said(heading: str, text: str) -> str:
    return f"<div><h3>{escape(heading)}</h3><p>{_prose(text)}</p></div>"


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_side(right)}>{escape(cell)}</th>'
        for cell, right in zip(table.header, table.numeric, strict=True)
    )
    lines = []
    for row in table.rows:
        cells = "".join(
            f"<td{_side(right) or _long(cell)}>{_two_lines(cell)}</td>"
            for cell, right in zip(row, table.numeric, strict=True)
        )
        lines.append(f"<tr>{cells}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    count = escape(table.caption) or f"{len(table.rows)} rows"
    scroll = f'<div class="scroll" tabindex="0"><table>{body}</table></div>'
    return f'<details open=""><summary>{count}</summary>{scroll}</details>'


def _two_lines(cell: str) -> str:
    """What follows a line's end, such as an interval, in small."""
    first, _, rest = cell.partition("\n")
    return _prose(first) + (f"<small>{_prose(rest)}</small>" if rest else "")


def _side(right: bool) -> str:
    return ' class="number"' if right else ""


def _long(cell: str) -> str:
    return ' class="words"' if len(cell) > WORDS else ""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2733; --soft: #5a6772;
  --line: #dfe4e9; --tint: #f5f7f9; --faint: #c9d1d9; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14191f; --ink: #dde3ea; --soft: #9aa6b2;
  --line: #2c353e; --tint: #1b2229; --faint: #4a5661; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3.5rem 0 1rem; padding-top: 1rem;
  border-top: 2px solid var(--ink); }
h2 span { color: var(--soft); font-weight: 400; margin-right: .35em; }
h3 { font-size: .8rem; margin: 0 0 .25rem; color: var(--soft); font-weight: 600; }
p { margin: 0 0 .75rem; }
a { color: inherit; text-underline-offset: .15em; }
.lead { font-size: 1.1rem; color: var(--soft); }
.setting { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem;
  margin: 1.5rem 0; padding: 1rem 1.25rem; background: var(--tint); border-radius: 6px;
  font-size: .9rem; }
.setting dt { color: var(--soft); }
.setting dd { margin: 0; overflow-wrap: anywhere; }
.note { font-size: .85rem; color: var(--soft); margin: .75rem 0 0; }
nav ol { padding-left: 1.4rem; margin: 1.75rem 0 0; }
nav li { margin-bottom: .6rem; }
nav li a { font-weight: 600; }
nav li p { margin: .1rem 0 0; font-size: .92rem; }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; margin-bottom: 1rem; }
.both > div { border-left: 3px solid var(--line); padding-left: .9rem; font-size: .95rem; }
.both > div:last-child { border-color: var(--mark); }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; }
section > p, nav, header { max-width: 60rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 1.25rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; font-weight: 600; text-align: center; order: -1; }
figure { display: flex; flex-direction: column; margin: 0 auto; padding: .5rem; width: 100%;
  max-width: 34rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-size: .85rem; color: var(--soft); }
.scroll { overflow-x: auto; margin-top: .4rem; }
table { border-collapse: collapse; font-size: .8rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; border-bottom: 1px solid var(--ink); }
td { white-space: nowrap; vertical-align: top; }
th, td { padding: .28rem .6rem .28rem 0; }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; }
td.words { white-space: normal; min-width: 9rem; max-width: 24rem; }
td.words small { line-height: 1.3; margin-top: .15rem; }
th { white-space: normal; vertical-align: bottom; }
td small { display: block; color: var(--soft); font-size: .72rem; line-height: 1.1; }
@media (max-width: 42rem) {
  main { padding: 1.25rem 1rem 3rem; }
  .both { grid-template-columns: 1fr; gap: .75rem; }
  .setting { grid-template-columns: 1fr; gap: 0; }
  .setting dd { margin-bottom: .4rem; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --tint: #f5f7f9; --faint: #999; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  section h2 { break-after: avoid; }
  figure, .both, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  summary { display: none; }
}
"""
