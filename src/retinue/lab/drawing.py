"""Charts as SVG, by matplotlib: the same chart gives the same bytes.

Text stays text, so that a page can be searched and read aloud. Lines differ by colour, by marker
and by dash, so that they can be told apart without colours. What is neither takes the page's ink,
in light and in dark.
"""

import importlib.util
import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

import numpy as np

from retinue.lab.base import Chart, Series

HOW_TO_GET = "pip install 'retinue[reproduce]'"
WIDTH, HEIGHT = 5.4, 3.5  # inches
INK, FAINT, GRID = "#1c2733", "#c9d1d9", "#e6eaee"
# What they become in a page, where it says what these are; else the colour itself.
IN_A_PAGE = {
    INK: f"var(--ink, {INK})",
    FAINT: f"var(--faint, {FAINT})",
    GRID: f"var(--line, {GRID})",
    "#ffffff": "var(--paper, #ffffff)",
}
# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", INK)
FEW = 4  # intervals that can lie over each other as bands; more are whiskers
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "++")
STYLE: Any = {
    "svg.hashsalt": "retinue",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # what matplotlib brings along: widths are the same
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(chart: Chart, prefix: str) -> str:
    """`chart` as an SVG element for a page; `prefix` keeps its ids apart from those of others."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        if chart.kind == "lines":
            _lines(axes, chart)
        else:
            _bars(axes, chart)
        axes.set_xlabel(chart.x_label)
        axes.set_ylabel(chart.y_label)
        axes.grid(visible=chart.kind == "lines", axis="x")
        if chart.log_y:
            axes.set_yscale("log")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    return _for_a_page(out.getvalue(), prefix, describe(chart))


def describe(chart: Chart) -> str:
    """What a chart shows, in words, for who cannot see it."""
    parts = [f"{chart.title}: {chart.y_label.strip()} over {chart.x_label.strip()}."]
    for series in chart.series:
        known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
        values = ", ".join(f"{_word(x)}: {y:.4g}" for x, y in known)
        parts.append(f"{series.label}: {values}.")
    return " ".join(parts)


def _word(x: float | str) -> str:
    return x.replace("\n", " ") if isinstance(x, str) else f"{x:g}"


def _lines(axes: Any, chart: Chart) -> None:
    for at, series in enumerate(chart.series):
        look: dict[str, Any] = {
            "color": COLOURS[at % len(COLOURS)],
            "marker": MARKERS[at % len(MARKERS)],
            "linestyle": DASHES[at % len(DASHES)],
        }
        y = _numbers(series.y)
        axes.plot(series.x, y, label=series.label, markersize=4.5, linewidth=1.4, **look)
        if series.low and series.high and len(chart.series) <= FEW:
            low, high = _numbers(series.low), _numbers(series.high)
            axes.fill_between(series.x, low, high, color=look["color"], alpha=0.12, linewidth=0)
        else:
            _whiskers(axes, series, series.x, y, look["color"])
    if chart.reference is not None:
        axes.axhline(
            chart.reference, color=INK, linewidth=0.8, linestyle=":", label=chart.reference_label
        )
    if chart.log_x:
        axes.set_xscale("log", base=2)
    _ticks(axes, chart)


def _ticks(axes: Any, chart: Chart) -> None:
    """One tick for each place where something was measured, if they are few."""
    from matplotlib.ticker import NullLocator

    places = sorted({x for series in chart.series for x in series.x if not isinstance(x, str)})
    if 1 < len(places) <= 9:
        axes.set_xticks(places, [f"{place:.3g}" for place in places])
        axes.xaxis.set_minor_locator(NullLocator())


def _bars(axes: Any, chart: Chart) -> None:
    names = [_label(x) for x in chart.series[0].x]
    place = np.arange(len(names), dtype=np.float64)
    stacked = chart.kind == "stacked"
    width = 0.7 if stacked else 0.8 / len(chart.series)
    bottom = np.zeros(len(names))
    for at, series in enumerate(chart.series):
        y = _numbers(series.y)
        left = place if stacked else place + (at - (len(chart.series) - 1) / 2) * width
        look: dict[str, Any] = {"color": COLOURS[at % len(COLOURS)], "edgecolor": "white"}
        look |= {"hatch": HATCHES[at % len(HATCHES)], "linewidth": 0.4}
        axes.bar(left, y, width, bottom=bottom if stacked else None, label=series.label, **look)
        _whiskers(axes, series, left, y)
        if stacked:
            bottom = bottom + np.nan_to_num(y)
    axes.set_xticks(place, names, fontsize=8)


def _whiskers(axes: Any, series: Series, left: Any, y: Any, colour: str = INK) -> None:
    if series.low and series.high:
        spread = np.abs([y - _numbers(series.low), _numbers(series.high) - y])
        axes.errorbar(left, y, spread, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2)


def _label(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def _numbers(values: Sequence[float | None]) -> Any:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _for_a_page(svg: str, prefix: str, words: str) -> str:
    """Without the head of a file of its own; with ids of its own, scalable, and named."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    for colour, name in IN_A_PAGE.items():
        svg = re.sub(rf"(fill|stroke): {colour}", rf"\g<1>: {name}", svg)
    words = words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{words}"', 1).strip()
