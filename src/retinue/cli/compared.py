"""What `retinue simulate` takes from a folder of `retinue compare`: disks, costs, and live speeds.

There presets took turns, several times each, so that their costs can be told apart from chance.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path

from retinue.cli.simulated import Known, Room, facts_of
from retinue.compare.grid import BASE, DEFAULT, Budget, Disk, Grid
from retinue.compare.ran import Place, Ran
from retinue.errors import UsageError
from retinue.lab.base import number
from retinue.lab.ledger import Ledger
from retinue.model.survey import fingerprint
from retinue.sim.cells import Cell
from retinue.sim.link import Roads
from retinue.sim.passes import Load
from retinue.sim.recommend import Evidence
from retinue.sim.stage import Setting
from retinue.trace import Trace

LIVE = "live"  # of the ledger
COMPARE = (
    "`retinue compare MODEL --runs 3 --data FILE --out DIR`, then `--compared DIR`, to tell presets"
    " apart"
)
OTHERS = (
    *("bench", "disk", "bus", "latency", "expert_time", "layer_time", "pass_time"),
    *("elsewhere_time", "expert_size"),
)


class Compared:
    """The machine as the comparison found it, in place of `Machine`.

    A cell has the costs of the nearest place on the same disk.
    """

    def __init__(self, trace: Trace, known: Known, options: Namespace) -> None:
        self.facts = facts_of(trace, options)
        self.read_bytes = trace.head.read_bytes or self.facts.read_bytes
        if given := [name for name in OTHERS if getattr(options, name) is not None]:
            raise UsageError(
                f"`--compared` says this already: `--{given[0].replace('_', '-')}`",
                hint="leave one of them out",
            )
        setting = {"precision": trace.head.precision}
        if known.folder is not None:
            setting["model"] = fingerprint(known.folder)
        rows = Ledger(Path(options.compared), setting).entry(LIVE).rows
        budgets = dict.fromkeys((str(row["memory"]), row["experts"]) for row in rows)
        limits = dict.fromkeys(row["read_limit"] for row in rows)
        grid = Grid(
            tuple(dict.fromkeys(str(row["preset"]) for row in rows)),
            tuple(Budget(memory, None if each is None else str(each)) for memory, each in budgets),
            tuple(Disk(None if limit is None else str(limit)) for limit in limits),
            runs=1 + max((int(number(row, "run") or 0) for row in rows), default=0),
            new_tokens=1,
        )
        self._ran = Ran(rows, grid)
        if not self._ran.places:
            raise UsageError(f"`{options.compared}` has no runs of `{BASE}`", hint=COMPARE)
        self._places: dict[tuple[str, Roads], Place] = {}  # of cells

    def cells(self, rooms: Sequence[Room], load: Load) -> list[Cell]:
        """Each room on each disk."""
        ran, found = self._ran, []
        for label, slots in rooms:
            for disk in dict.fromkeys(place.disk for place in ran.places):
                place = self._nearest(slots, disk)
                plain, own = ran.measured(self.facts, place)
                roads = ran.roads(place)
                found.append(Cell(label, Setting(slots, roads, plain, load, own)))
                self._places[label, roads] = place
        return found

    def evidence(self, cell: Cell) -> Evidence:
        """The cell with the costs of each run, and how fast presets were there."""
        place = self._places[cell.label, cell.setting.roads]
        ran, settings = self._ran, list[Setting]()
        for run in ran.repeats(place):
            plain, own = ran.measured(self.facts, place, run)
            settings.append(replace(cell.setting, times=plain, own=own))
        return Evidence(settings, partial(self._live, place))

    def _nearest(self, slots: int, disk: Disk) -> Place:
        places = [place for place in self._ran.places if place.disk == disk]
        return min(places, key=lambda place: abs(log(self._ran.slots(place) / slots)))

    def _live(
        self, place: Place, preset: str, prefill_tokens: int, decode_tokens: int
    ) -> list[float]:
        """How many times as fast as `auto` it served so many tokens, in each run."""

        def seconds(name: str) -> dict[int, float]:
            found = {}
            for row in self._ran.rows.get((place, name), ()):
                prefill, decode = (
                    number(row, f"{phase}_tokens_per_s") or 0.0 for phase in ("prefill", "decode")
                )
                if prefill and decode:
                    run = int(number(row, "run") or 0)
                    found[run] = prefill_tokens / prefill + decode_tokens / decode
            return found

        mine, base = seconds(preset), seconds(DEFAULT)
        return [base[run] / mine[run] for run in base if run in mine]
