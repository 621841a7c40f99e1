"""What a replay of the same texts says of each cell, beside what was measured, and the oracle.

The routing is recorded once, prompts and fed tokens as they ran live. How long computing, starting
a read and looking ahead take comes from live runs elsewhere: of the preset itself and of
`on-demand`, at the nearest other budgets on the same disk, or else on the fastest other disk. How
fast reads are comes from reading alone, just before each run at the place. So what a replay says of
a cell knows nothing else of it, unless it is the only one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import log
from pathlib import Path
from statistics import median
from typing import Any

from retinue.compare.grid import BASE, DEFAULT, Budget, Disk, Grid
from retinue.config import parse_size
from retinue.engine.reserve import given_of
from retinue.engine.tasks import TaskIds
from retinue.engine.tracing import ASKED, record, trace_head
from retinue.errors import UsageError
from retinue.lab.base import Row, number
from retinue.lab.bench import Bench
from retinue.memory.read_speed import ReadSpeed
from retinue.model.predictors import find_predictor
from retinue.policy.predict.learned import Learned
from retinue.policy.preset import Preset
from retinue.policy.presets import preset
from retinue.sim.candidates import Known, candidates
from retinue.sim.cells import ORACLE, Cell, Table
from retinue.sim.costs import Times, averaged, read_speed_of, times_of_bench
from retinue.sim.link import Roads
from retinue.sim.passes import Load
from retinue.sim.recorded import Recording
from retinue.sim.stage import Setting
from retinue.trace import SIGNALS, Trace, TraceHead, TraceWriter, append

NAME = "replay"
COUNTS = ("reads", "lacking", "looks")


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

    def slopes(self, place: Place, preset: str = BASE) -> dict[str, float | None]:
        """What one more of something costs, by all runs of `preset` elsewhere on this disk.

        Where all passes are alike, a slope says little: each counts as far as they varied.
        """
        others = [other for other in self.places if other != place and other.disk == place.disk]
        near = others or self.elsewhere(place)
        rows = [row for other in near for row in self.rows.get((other, preset), ())]
        return {f"{name}_s": _slope(rows, name) for name in ("late", "start")}

    def _far(self, place: Place, other: Place) -> tuple[bool, float, float]:
        """Another disk is further away than another budget, and of disks the slower ones are."""
        fast = float("inf") if other.disk.limit is None else float(parse_size(other.disk.limit))
        share = round(abs(log(self.slots(other) / self.slots(place))), 1)
        return other.disk != place.disk, share, -fast


class Replays:
    """Replays of a grid. `file` keeps the recorded routing; it is made where it is missing."""

    def __init__(self, bench: Bench, grid: Grid, file: Path) -> None:
        self._bench, self._grid, self._file = bench, grid, file

    def measure(self, live: Sequence[Row]) -> None:
        """Put one row for each cell into the ledger, from the live rows of `on-demand`.

        Nothing is kept from earlier: a replay takes moments, and more runs know times better.
        """
        bench, entry = self._bench, self._bench.ledger.entry(NAME)
        entry.cells.clear()
        entry.left_out.clear()
        ran = Ran(live, self._grid)
        if ran.places:
            trace = self._trace()
            able, reasons = candidates(self._presets(), trace.head, self._known, timed=False)
            entry.left_out = {name: f"not replayed: {why}" for name, why in reasons.items()}
            needs = sorted(frozenset().union(*(each.needs for each in able)))
            table = Table(Recording(trace, needs), able, trace.head.read_bytes)
            for place in ran.places:
                bench.check()
                key = f"{place.budget.memory}, {place.budget.experts}, {place.disk.limit}"
                entry.cells[key] = self._cell(table, ran, place)
            bench.say(f"{NAME}: {len(entry.cells)} places, {len(able)} presets")
        entry.done = True
        bench.ledger.keep(NAME)

    def _cell(self, table: Table, ran: "Ran", place: "Place") -> list[Row]:
        filled = table.fill(Cell(place.budget.label, self._setting(ran, place)), self._bench.check)
        best = filled.oracle["hit_rate"] if filled.oracle is not None else None
        where: Row = {**asdict(place.budget), "read_limit": place.disk.limit}
        return [
            where | {"preset": name, "belady_hit_rate": best} | _numbers(found)
            for name, found in filled.rows.items()
        ]

    def _setting(self, ran: "Ran", place: "Place") -> Setting:
        facts, plain, found = self._bench.facts, list[Times](), dict[str, list[Times]]()
        for at in ran.elsewhere(place):
            plain.append(times_of_bench(facts, ran.runs[at, BASE] | ran.slopes(place)))
            for (where, name), run in ran.runs.items():
                if where == at and name != BASE:
                    times = times_of_bench(facts, run | ran.slopes(place, name), plain[-1])
                    found.setdefault(name, []).append(times)
        own = {name: averaged(times) for name, times in found.items()}
        speed = ran.read_speed(place)
        roads = Roads(speed.bytes_per_s, speed.latency_s, in_turn=place.disk.limit is not None)
        return Setting(
            ran.slots(place), roads, averaged(plain), Load(1, self._bench.config.chunk), own
        )

    def _presets(self) -> list[Preset]:
        names = dict.fromkeys((*self._grid.presets, ORACLE))
        return [preset(name) for name in names]

    def _known(self, row: Preset, slots: int) -> Known:
        """What is known of the model for one preset. Raises Refused where it lacks a profile."""
        bench = self._bench
        given = given_of(bench.folder, bench.facts, slots, row, bench.config)
        return Known(given, self._learned)

    @cached_property
    def _learned(self) -> Learned | None:
        """Read once: every preset asks for it in every cell."""
        return find_predictor(self._bench.folder, self._bench.facts)

    def _trace(self) -> Trace:
        """The recorded routing of the texts, with the signals that the presets look at."""
        bench, budget = self._bench, self._grid.budgets[-1]
        kept = Trace(self._file) if self._file.is_file() else None
        if kept is not None and self._needed(kept.head) <= set(kept.head.signals):
            return kept
        bench.say(f"{NAME}: the routing of the texts is recorded")
        with bench.opened(**asdict(budget), preset=DEFAULT, read_limit=None) as llm:
            assembly = llm.assembly
            needed = self._needed(trace_head(assembly))
            if not assembly.host.sees_ahead:
                needed -= ASKED
            signals = tuple(name for name in SIGNALS if name in needed)
            head = trace_head(assembly, signals=signals)
            texts = [fed(text, self._grid.new_tokens) for text in bench.texts]
            with TraceWriter(self._file, head) as writer:
                append(writer, record(assembly, head, texts, bench.check))
        return Trace(self._file)

    def _needed(self, head: TraceHead) -> set[str]:
        """The signals that any preset of the grid looks at."""
        whole = replace(head, signals=SIGNALS)
        able, _ = candidates(self._presets(), whole, self._known, timed=False)
        return set(frozenset().union(*(each.needs for each in able)))


def fed(text: TaskIds, new_tokens: int) -> TaskIds:
    """A text as it runs live: the prompt, and the tokens that decoding steps are fed."""
    prompt, rest = text.ids[: -text.scored], text.ids[-text.scored :][: new_tokens + 1][:-1]
    return replace(text, ids=[*prompt, *rest], scored=len(rest))


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


def _numbers(row: dict[str, Any]) -> Row:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}
