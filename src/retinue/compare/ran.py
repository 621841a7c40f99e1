"""What live runs say of costs: documents of `retinue bench`, by place and preset, as `Times`.

How fast reads are is measured by reading alone, just before each run. What computing, starting a
read and looking ahead take is in the runs of the preset and of `on-demand`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import log
from statistics import median
from typing import Any

from retinue.compare.grid import BASE, Budget, Disk, Grid
from retinue.config import parse_size
from retinue.errors import UsageError
from retinue.lab.base import Row, number
from retinue.memory.read_speed import ReadSpeed
from retinue.sim.costs import Times, averaged, read_speed_of, times_of_bench
from retinue.sim.link import Roads
from retinue.types import Facts

COUNTS = ("reads", "lacking", "looks")
Slopes = dict[str, float | None]
Known = tuple[Times, dict[str, Times]]  # of `on-demand`, and of the others by name


@dataclass(frozen=True, slots=True)
class Place:
    """A budget on a disk."""

    budget: Budget
    disk: Disk


class Ran:
    """Live runs, by place and preset, as documents of `retinue bench`: of several the middle one.

    `places` are those of the grid where `on-demand` ran; `rows` are all runs.
    """

    def __init__(self, live: Sequence[Row], grid: Grid) -> None:
        self.runs: dict[tuple[Place, str], dict[str, Any]] = {}
        self.rows: dict[tuple[Place, str], list[Row]] = {}
        for place in (Place(budget, disk) for budget in grid.budgets for disk in grid.disks):
            where = {**asdict(place.budget), "read_limit": place.disk.limit}
            here = [row for row in live if where.items() <= row.items()]
            for name in dict.fromkeys(str(row["preset"]) for row in here):
                runs = [row for row in here if row["preset"] == name]
                self.runs[place, name] = as_bench(_middle(runs))
                self.rows[place, name] = runs
        self.places = [place for place, name in self.runs if name == BASE]

    def slots(self, place: Place) -> int:
        """Room for so many experts."""
        return int(self.runs[place, BASE]["slots"])

    def read_speed(self, place: Place) -> ReadSpeed:
        """How fast reads were, as measured before each run at the place: medians."""
        found = [read_speed_of(run) for (at, _), run in self.runs.items() if at == place]
        speeds = [speed for speed in found if speed is not None]
        if not speeds:
            raise UsageError(
                "the live runs are of an older version: they do not say how fast reads were",
                hint="start again with `--fresh`",
            )
        return ReadSpeed(
            median(speed.latency_s for speed in speeds),
            median(speed.bytes_per_s for speed in speeds),
        )

    def elsewhere(self, place: Place) -> list[Place]:
        """The nearest other places, of the same disk if there are any: as a rule one, or two."""
        others = [other for other in self.places if other != place]
        distances = [self._far(place, other) for other in others]
        least = min(distances, default=None)
        found = zip(others, distances, strict=True)
        return [other for other, distance in found if distance == least] or [place]

    def slopes(self, place: Place, preset: str = BASE) -> Slopes:
        """What one more of something costs, by all runs of `preset` elsewhere on this disk."""
        others = [other for other in self.places if other != place and other.disk == place.disk]
        return self._slopes(others or self.elsewhere(place), preset)

    def roads(self, place: Place) -> Roads:
        """The place's disk, as fast as it was."""
        speed = self.read_speed(place)
        return Roads(speed.bytes_per_s, speed.latency_s, in_turn=place.disk.limit is not None)

    def foreseen(self, facts: Facts, place: Place) -> Known:
        """What computing takes at `place`, as far as runs elsewhere tell."""
        near = [
            self._times(facts, at, lambda name: self.slopes(place, name))
            for at in self.elsewhere(place)
        ]
        names = dict.fromkeys(name for _, own in near for name in own)
        own = {name: averaged([own[name] for _, own in near if name in own]) for name in names}
        return averaged([plain for plain, _ in near]), own

    def measured(self, facts: Facts, place: Place, run: int | None = None) -> Known:
        """What computing took at `place`: in the middle run, or in `run`."""
        disk = [other for other in self.places if other.disk == place.disk]
        return self._times(facts, place, lambda name: self._slopes(disk, name), run)

    def repeats(self, place: Place) -> list[int]:
        """The runs in which `on-demand` had its turn at `place`."""
        return [int(number(row, "run") or 0) for row in self.rows[place, BASE]]

    def _times(
        self, facts: Facts, at: Place, slopes: Callable[[str], Slopes], run: int | None = None
    ) -> Known:
        documents = {
            name: self.runs[where, name] if run is None else as_bench(row)
            for (where, name), rows in self.rows.items()
            for row in rows
            if where == at and run in (None, row["run"])
        }
        plain = times_of_bench(facts, documents.pop(BASE) | slopes(BASE))
        return plain, {
            name: times_of_bench(facts, each | slopes(name), plain)
            for name, each in documents.items()
        }

    def _slopes(self, places: Sequence[Place], preset: str) -> Slopes:
        """Where all passes are alike, a slope says little: each counts as far as they varied."""
        rows = [row for place in places for row in self.rows.get((place, preset), ())]
        return {f"{name}_s": _slope(rows, name) for name in ("late", "start")}

    def _far(self, place: Place, other: Place) -> tuple[bool, float, float]:
        """Another disk is further away than another budget, and of disks the slower ones are."""
        fast = float("inf") if other.disk.limit is None else float(parse_size(other.disk.limit))
        share = round(abs(log(self.slots(other) / self.slots(place))), 1)
        return other.disk != place.disk, share, -fast


def as_bench(run: Row) -> dict[str, Any]:
    """A live row as `retinue bench` would say it: of one prompt, the mean of all."""
    texts = number(run, "texts") or 1.0
    seconds = ("expert_s", "dense_s", "overhead_s")
    names = [f"prefill_{name}" for name in (*seconds, *COUNTS)]
    prompt = {name: (number(run, name) or 0.0) / texts for name in names}
    return {**run, **prompt, "prompt_tokens": (number(run, "prefill_tokens") or 0.0) / texts}


def _slope(rows: Sequence[Row], name: str) -> float | None:
    """The common slope of lines through each run's passes; None: nothing varied."""
    pairs = [(number(row, f"{name}_s"), number(row, f"{name}_spread") or 0.0) for row in rows]
    known = [(slope, spread) for slope, spread in pairs if slope is not None]
    whole = sum(spread for _, spread in known)
    return sum(slope * spread for slope, spread in known) / whole if whole else None


def _middle(runs: Sequence[Row]) -> Row:
    """Of each phase the run of the median speed; of two the faster, as what disturbs makes slower.

    The phases' keys are told apart by their beginning.
    """

    def middle(phase: str) -> Row:
        by_speed = sorted(runs, key=lambda row: number(row, f"{phase}_tokens_per_s") or 0.0)
        return by_speed[len(by_speed) // 2]

    prefill = {key: each for key, each in middle("prefill").items() if key.startswith("prefill_")}
    return middle("decode") | prefill
