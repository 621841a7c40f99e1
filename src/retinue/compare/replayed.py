"""What a replay of the same texts says of each cell, beside what was measured, and the oracle.

The routing is recorded once, prompts and fed tokens as they ran live. How long computing, starting
a read and looking ahead take comes from live runs elsewhere: of the preset itself and of
`on-demand`, at the nearest other budgets on the same disk, or else on the fastest other disk. How
fast reads are comes from reading alone, just before each run at the place. So what a replay says of
a cell knows nothing else of it, unless it is the only one.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from retinue.compare.grid import DEFAULT, Grid
from retinue.compare.ran import Place, Ran
from retinue.engine.reserve import given_of
from retinue.engine.tasks import TaskIds
from retinue.engine.tracing import ASKED, record, trace_head
from retinue.lab.base import Row
from retinue.lab.bench import Bench
from retinue.model.predictors import find_predictor
from retinue.policy.predict.learned import Learned
from retinue.policy.preset import Preset
from retinue.policy.presets import preset
from retinue.sim.candidates import Known, candidates
from retinue.sim.cells import ORACLE, Cell, Table
from retinue.sim.passes import Load
from retinue.sim.recorded import Recording
from retinue.sim.stage import Setting
from retinue.trace import SIGNALS, Trace, TraceHead, TraceWriter, append

NAME = "replay"


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

    def _cell(self, table: Table, ran: Ran, place: Place) -> list[Row]:
        filled = table.fill(Cell(place.budget.label, self._setting(ran, place)), self._bench.check)
        best = filled.oracle["hit_rate"] if filled.oracle is not None else None
        where: Row = {**asdict(place.budget), "read_limit": place.disk.limit}
        return [
            where | {"preset": name, "belady_hit_rate": best} | _numbers(found)
            for name, found in filled.rows.items()
        ]

    def _setting(self, ran: Ran, place: Place) -> Setting:
        plain, own = ran.foreseen(self._bench.facts, place)
        load = Load(1, self._bench.config.chunk)
        return Setting(ran.slots(place), ran.roads(place), plain, load, own)

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


def _numbers(row: dict[str, Any]) -> Row:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}
