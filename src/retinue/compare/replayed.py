"""What a replay of the same texts says of each cell, beside what was measured, and the oracle.

The routing is recorded once, prompts and fed tokens as they ran live. How long computing takes
comes from the live runs of `on-demand` at the same budget, for all presets alike, and how fast
reads are from a probe of the disk and the limit: so what a replay says of the others is a forecast.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from retinue.compare.grid import BASE, DEFAULT, Budget, Disk, Grid
from retinue.config import parse_size
from retinue.engine.reserve import given_of
from retinue.engine.tasks import TaskIds
from retinue.engine.tracing import record, trace_head
from retinue.lab.base import Row, number
from retinue.lab.bench import Bench
from retinue.memory.machine import known_speeds
from retinue.model.predictors import find_predictor
from retinue.policy.predict.learned import Learned
from retinue.policy.preset import Preset
from retinue.policy.presets import preset
from retinue.sim.candidates import Known, candidates
from retinue.sim.cells import ORACLE, Cell, Table
from retinue.sim.costs import latency_of_bench, times_of_bench
from retinue.sim.link import Roads
from retinue.sim.passes import Load
from retinue.sim.recorded import Recording
from retinue.sim.stage import Setting
from retinue.trace import SIGNALS, Trace, TraceHead, TraceWriter, append

NAME = "replay"
LATENCY_S = 1e-4  # of a read, where the live runs say nothing of it
ASKED = {"scores", "next_scores"}  # signals of routers that may not be there to ask


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
        base = [row for row in live if row["preset"] == BASE]
        if base:
            trace = self._trace()
            able, reasons = candidates(self._presets(), trace.head, self._known, timed=False)
            entry.left_out = {name: f"not replayed: {why}" for name, why in reasons.items()}
            needs = sorted(frozenset().union(*(each.needs for each in able)))
            table = Table(Recording(trace, needs), able, trace.head.read_bytes)
            for budget in self._grid.budgets:
                for disk in self._grid.disks:
                    bench.check()
                    key = f"{budget.memory}, {budget.experts}, {disk.limit}"
                    entry.cells[key] = self._cell(table, base, budget, disk)
            bench.say(f"{NAME}: {len(entry.cells)} places, {len(able)} presets")
        entry.done = True
        bench.ledger.keep(NAME)

    def _cell(self, table: Table, base: Sequence[Row], budget: Budget, disk: Disk) -> list[Row]:
        runs = [row for row in base if (row["memory"], row["experts"]) == _place(budget)]
        runs = [row for row in runs if row["read_limit"] == self._grid.disks[0].limit] or runs
        if not runs:
            return []
        setting = self._setting(_middle(runs), disk)
        filled = table.fill(Cell(budget.label, setting), self._bench.check)
        best = filled.oracle["hit_rate"] if filled.oracle is not None else None
        where: Row = {**asdict(budget), "read_limit": disk.limit}
        return [
            where | {"preset": name, "belady_hit_rate": best} | _numbers(found)
            for name, found in filled.rows.items()
        ]

    def _setting(self, run: Row, disk: Disk) -> Setting:
        facts = self._bench.facts
        native = known_speeds(self._bench.folder).disk_bytes_per_s
        rate = native if disk.limit is None else min(native, float(parse_size(disk.limit)))
        document = as_bench(run) | {"disk_bytes_per_s": native}
        latency = None
        if run["read_limit"] is None:
            latency = latency_of_bench(document, facts, facts.read_bytes)
        roads = Roads(rate, LATENCY_S if latency is None else latency)
        load = Load(1, self._bench.config.chunk)
        return Setting(int(number(run, "slots") or 0), roads, times_of_bench(facts, document), load)

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
    names = ("prefill_expert_s", "prefill_dense_s", "prefill_overhead_s")
    prompt = {name: (number(run, name) or 0.0) / texts for name in names}
    return {**run, **prompt, "prompt_tokens": (number(run, "prefill_tokens") or 0.0) / texts}


def _middle(runs: Sequence[Row]) -> Row:
    """The run of the median speed, or the slower one of the two in the middle."""
    by_speed = sorted(runs, key=lambda row: number(row, "decode_tokens_per_s") or 0.0)
    return by_speed[(len(by_speed) - 1) // 2]


def _numbers(row: dict[str, Any]) -> Row:
    return {key: value for key, value in row.items() if isinstance(value, (int, float))}


def _place(budget: Budget) -> tuple[str, str | None]:
    return budget.memory, budget.experts
