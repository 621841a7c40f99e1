"""Who is faster, and how sure that is: pairs of the same run, one beside the other.

A preset is `slower` than another, or `faster`, only where it was so in every run; otherwise it is
`within the spread`. So with five runs chance alone calls one in thirty-two equals slower. One run
has no spread and no verdict.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from retinue.lab.base import Row, number

FASTER, WITHIN, SLOWER = "faster", "within the spread", "slower"
DEMANDED = "slower, as its paper demands"
LEAST_RUNS = 2


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, and the least and the most of them."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Of one value or more."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def paired(rows: Sequence[Row], others: Sequence[Row], key: str) -> Spread | None:
    """`key` of each row over that of the other's row of the same run; None without a pair."""
    theirs = {row["run"]: number(row, key) for row in others}
    ratios = [
        mine / other
        for row in rows
        if (mine := number(row, key)) and (other := theirs.get(row["run"]))
    ]
    return spread(ratios) if ratios else None


def verdict(ratios: Spread | None, demanded: str = "") -> str | None:
    """What the pairs say of a speed; `demanded`: why the preset's paper makes it slow, if it does.

    None where there are too few.
    """
    if ratios is None or ratios.count < LEAST_RUNS:
        return None
    if ratios.high < 1:
        return DEMANDED if demanded else SLOWER
    return FASTER if ratios.low > 1 else WITHIN
