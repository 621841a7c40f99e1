"""From measured rows to the cells of a table, as people read them."""

from collections.abc import Sequence
from typing import Any

from retinue.config import format_size
from retinue.lab.base import Column, Row, number
from retinue.lab.page import Table


def table_of(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """The columns that any row has."""
    shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    return Table(
        header=[column.heading for column in shown],
        rows=[[cell(column, row) for column in shown] for row in rows],
        numeric=[bool(column.form) for column in shown],
    )


def cell(column: Column, row: Row) -> str:
    """One value as people read it, its interval on a second line; empty where there is none."""
    value = row.get(column.key)
    if value is None:
        return ""
    low, high = number(row, column.low), number(row, column.high)
    text = _written(value, column.form)
    if low is None or high is None:
        return text
    ends = _written(low, column.form), _written(high, column.form)
    return text if ends[0] == ends[1] else f"{text}\n{ends[0]} to {ends[1]}"


def said(value: Any) -> str:
    """A value of a setting; a list has commas between."""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)


def _written(value: Any, form: str) -> str:
    if form == "bytes":
        return format_size(float(value))
    return format(value, form) if form else str(value)
