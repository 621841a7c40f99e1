"""Rows, columns and charts: what experiments find and how it is shown. Plain data."""

from collections.abc import Sequence
from dataclasses import dataclass

Value = str | float | int | bool | None
Row = dict[str, Value]  # one line of a table; JSON-shaped, so that a run can go on from the disk
NOTHING_YET = "Too little was measured to say."


@dataclass(frozen=True, slots=True)
class Column:
    """A column of an experiment's table: the key of its rows, a heading, and how to write it.

    form: a format such as `.3f`; `bytes` for a size. low, high: the keys of an interval that is
    written below the value.
    """

    key: str
    heading: str
    form: str = ""
    low: str = ""
    high: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one set of bars: `y` over `x`; None is a gap. low, high: an interval."""

    label: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot as data. kind: `lines`, `bars` (side by side) or `stacked`."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: str = "lines"
    log_y: bool = False
    log_x: bool = False
    reference: float | None = None  # a horizontal line, such as the plain model's value
    reference_label: str = ""


def number(row: Row, key: str) -> float | None:
    """The number under `key`, or None where the row has none."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def counted(count: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {what}{'s' * (count != 1)}"


def lines_by(
    rows: Sequence[Row], label: str, x: str, y: str, spread: tuple[str, str] = ("", "")
) -> list[Series]:
    """One series for each value of `label`, in order of appearance; rows without `y` are left out.

    spread: the keys of an interval.
    """
    found = []
    for name in dict.fromkeys(str(row[label]) for row in rows):
        mine = [row for row in rows if str(row[label]) == name and number(row, y) is not None]
        if not mine:
            continue
        low, high = ([number(row, key) for row in mine] if key else [] for key in spread)
        places = [number(row, x) for row in mine]
        values = [place if place is not None else 0.0 for place in places]
        found.append(Series(name, values, [number(row, y) for row in mine], low, high))
    return found
