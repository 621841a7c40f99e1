"""Medians and ratios of runs that were taken in turn. Starts nothing, reads nothing."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from retinue.cli.terminal import table
from retinue.config import format_size

Document = dict[str, Any]

HEADER = ("benchmark", "what", "ours", "against", "", "ratio", "lowest", "highest", "")
LEAST_NOISE = 0.05


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. A ratio above 1 is in our favour, whatever the unit.

    `lowest` and `highest` are ratios of single rounds; `ok` is None where nothing was promised.
    """

    benchmark: str
    what: str
    unit: str
    ours: float
    against: str
    other: float
    ratio: float
    lowest: float
    highest: float
    ok: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as the table shows it."""
        verdict = {None: "", True: "ok", False: "NOT OK"}[self.ok]
        ratios = [f"{value:.2f}" for value in (self.ratio, self.lowest, self.highest)]
        ours, other = _shown(self.ours, self.unit), _shown(self.other, self.unit)
        return (self.benchmark, self.what, ours, self.against, other, *ratios, verdict)

    def promised(self, ratio: float) -> "Row":
        """The row with a verdict on its ratio; 0 promises nothing."""
        return replace(self, ok=self.ratio >= ratio) if ratio else self


@dataclass(frozen=True, slots=True)
class Report:
    """What one benchmark found: its rows, what a reader must know, and every single run."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: dict[str, list[Document]] = field(default_factory=dict)  # by engine, in order

    def as_dict(self) -> Document:
        """The report as JSON names it."""
        return asdict(self)


def compare(
    title: tuple[str, str, str],
    ours: Sequence[float],
    against: str,
    other: Sequence[float],
    *,
    less_is_better: bool = False,
    ok: bool | None = None,
) -> Row:
    """The row for `title`: benchmark, what is compared, unit.

    `ours` and `other` hold one value a round. The ratio is that of the medians.
    """
    assert len(ours) == len(other) > 0, "one value a round on both sides"
    pairs = [_ratio(a, b, less_is_better) for a, b in zip(ours, other, strict=True)]
    first, second = statistics.median(ours), statistics.median(other)
    ratio = _ratio(first, second, less_is_better)
    return Row(*title, first, against, second, ratio, min(pairs), max(pairs), ok)


def _ratio(ours: float, other: float, less_is_better: bool) -> float:
    above, below = (other, ours) if less_is_better else (ours, other)
    return above / below if below else 0.0


def values(documents: Sequence[Document], key: str) -> list[float]:
    """One number of every round."""
    return [float(document[key]) for document in documents]


def median_of(documents: Sequence[Document], key: str) -> float:
    """The median of one number over all rounds."""
    return statistics.median(values(documents, key))


def best(
    engines: dict[str, list[Document]], key: str, *, less_is_better: bool = False
) -> tuple[str, list[float]]:
    """The engine whose median of `key` is best, and its values."""
    medians = {name: statistics.median(values(runs, key)) for name, runs in engines.items()}
    name = (min if less_is_better else max)(medians, key=medians.__getitem__)
    return name, values(engines[name], key)


def noise(samples: Sequence[float]) -> float:
    """How far one run may lie from the median, relative to it: half the spread, but not under 5 %.

    Three runs can agree by chance, hence the floor.
    """
    spread = (max(samples) - min(samples)) / 2 / statistics.median(samples)
    return max(LEAST_NOISE, spread)


def not_slower(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the speeds `after` are at least those `before`, as far as the runs can tell."""
    allowed = max(noise(before), noise(after))
    return statistics.median(after) >= statistics.median(before) * (1 - allowed)


def show(rows: Sequence[Row]) -> str:
    """All rows as one table."""
    return table(HEADER, [row.cells() for row in rows])


def _shown(value: float, unit: str) -> str:
    return format_size(value) if unit == "bytes" else f"{value:.2f} {unit}"
