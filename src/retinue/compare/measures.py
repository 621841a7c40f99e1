"""A paper's measure in terms of what was compared: each a function of the cells.

Every measure gives one value a cell, so that the answer is a median with the least and the most
over budgets and disks. It gives none where a preset that it needs did not run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retinue.compare import foresight
from retinue.compare.grid import BASE
from retinue.compare.verdict import Spread, spread
from retinue.lab.base import Row, number

Place = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What measures look at: cells, and the rows of foresight."""

    cells: Sequence[Row]
    foresight: Sequence[Row] = ()

    def of(self, name: str) -> dict[Place, Row]:
        """The cells of one preset by where they were measured."""
        return {place_of(row): row for row in self.cells if row["preset"] == name}


@dataclass(frozen=True, slots=True)
class Measure:
    """`words`: what it is, for people. `form`: how its values are written."""

    words: str
    form: str
    values: Callable[[Seen], list[float]]

    def found(self, seen: Seen) -> Spread | None:
        """The values' spread; None where there are none."""
        values = self.values(seen)
        return spread(values) if values else None

    def written(self, found: Spread) -> str:
        """`1.10 (0.97 to 1.32)`, or the value alone."""
        low, middle, high = (format(v, self.form) for v in (found.low, found.median, found.high))
        return middle if low == high else f"{middle} ({low} to {high})"


def place_of(row: Row) -> Place:
    """Where a cell was measured: the budget and the disk."""
    return row["memory"], row["experts"], row["read_limit"]


def times(preset: str, other: str = BASE, phase: str = "decode") -> Measure:
    """How many times as fast as another preset."""
    key = f"{phase}_tokens_per_s"

    def values(seen: Seen) -> list[float]:
        return [mine / theirs for mine, theirs in _pairs(seen, preset, other, key) if theirs]

    return Measure(f"{phase} speed of `{preset}` over that of `{other}`", ".2f", values)


def change(preset: str, what: str, keys: Sequence[str], other: str = BASE) -> Measure:
    """By what share the sum of `keys` differs from another preset's."""

    def values(seen: Seen) -> list[float]:
        sums = [_pairs(seen, preset, other, key) for key in keys]
        found = [
            (sum(mine for mine, _ in cell), sum(theirs for _, theirs in cell))
            for cell in zip(*sums, strict=True)
        ]
        return [mine / theirs - 1 for mine, theirs in found if theirs]

    return Measure(f"{what} of `{preset}` against those of `{other}`", "+.0%", values)


def points(preset: str, other: str = BASE) -> Measure:
    """How many points of hit rate above another preset's."""

    def values(seen: Seen) -> list[float]:
        return [100 * (mine - theirs) for mine, theirs in _pairs(seen, preset, other, "hit_rate")]

    return Measure(f"points of hit rate of `{preset}` above `{other}`", "+.1f", values)


def belady_points() -> Measure:
    """How many points of hit rate Belady's rule is above recency, in the replay."""

    def values(seen: Seen) -> list[float]:
        rows = seen.of(BASE).values()
        keys = ("belady_hit_rate", "simulated_hit_rate")
        found = [tuple(number(row, key) for key in keys) for row in rows]
        return [100 * (a - b) for a, b in found if a is not None and b is not None]

    return Measure(f"points of hit rate of Belady's rule above `{BASE}`, replayed", "+.1f", values)


def value(preset: str, key: str, words: str, form: str = ".0%") -> Measure:
    """A number of the preset's own."""

    def values(seen: Seen) -> list[float]:
        found = [number(row, key) for row in seen.of(preset).values()]
        return [each for each in found if each is not None]

    return Measure(f"{words} of `{preset}`", form, values)


def loss_added(preset: str) -> Measure:
    """By how much the loss is above the plain model's, as a share of it."""

    def values(seen: Seen) -> list[float]:
        found = _pairs(seen, preset, preset, "nll", "nll_plain")
        return [mine / plain - 1 for mine, plain in found if plain]

    return Measure(f"loss of `{preset}` over the plain model's", "+.1%", values)


def next_gate() -> Measure:
    """How much of what a layer uses its router names one layer early."""

    def values(seen: Seen) -> list[float]:
        found = [number(row, "recall") for row in seen.foresight]
        whole = foresight.recall(seen.foresight)
        layers = [each for each in found if each is not None]
        # The mean in the middle, the best and the worst layer as its ends.
        return [] if whole is None else [min(layers), whole, max(layers)]

    return Measure("recall of the next layer's router, all layers (worst to best)", ".1%", values)


def _pairs(
    seen: Seen, preset: str, other: str, key: str, theirs_key: str = ""
) -> list[tuple[float, float]]:
    """`key` of both presets in each place where both ran."""
    mine, theirs = seen.of(preset), seen.of(other)
    found = []
    for place in mine:
        if place in theirs:
            pair = number(mine[place], key), number(theirs[place], theirs_key or key)
            if pair[0] is not None and pair[1] is not None:
                found.append((pair[0], pair[1]))
    return found
