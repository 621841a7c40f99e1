"""A table of replays: presets by rooms and disks, each beside the oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retinue.policy.policies import AsIs, Policies
from retinue.sim.candidates import Candidate, sizes_of
from retinue.sim.foreseen import foreseen
from retinue.sim.recorded import Recording
from retinue.sim.replay import Outcome, Replay
from retinue.sim.rows import Row, beside, row_of
from retinue.sim.stage import Setting

ORACLE = "belady"


@dataclass(frozen=True, slots=True)
class Cell:
    """Room for experts, as `label` says it, on one disk."""

    label: str
    setting: Setting


@dataclass(frozen=True, slots=True)
class Filled:
    """The rows of one cell, by preset; `oracle` is None where nothing could be foreseen."""

    cell: Cell
    rows: dict[str, Row]
    oracle: Row | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-shaped."""
        setting = self.cell.setting
        return {
            "experts": self.cell.label,
            "slots": setting.slots,
            "disk_bytes_per_s": setting.roads.disk_bytes_per_s,
            "presets": self.rows,
            "belady": self.oracle or {},
        }


class Table:
    """Replays `candidates` on one recording. `read_bytes` is what reading an expert moves."""

    def __init__(
        self, recording: Recording, candidates: Sequence[Candidate], read_bytes: int
    ) -> None:
        assert read_bytes > 0, read_bytes
        self._recording, self._read_bytes = recording, read_bytes
        self._candidates = candidates

    def fill(self, cell: Cell, advance: Callable[[], object]) -> Filled:
        """Replay all in one cell; `advance` is called after each."""
        rows: dict[str, Row] = {}
        for candidate in self._candidates:
            rows[candidate.preset.name] = row = row_of(self.replay(candidate, cell.setting))
            row["exact"] = candidate.preset.exact
            row["notes"] = list(candidate.notes)
            advance()
        oracle = rows.get(ORACLE)
        if oracle is not None:
            beside(rows, oracle)
        return Filled(cell, rows, oracle)

    def replay(
        self, candidate: Candidate, setting: Setting, *, ring: float | None = None
    ) -> Outcome:
        """Replay one preset; `ring` is the share of slots for what only passes, if not its own.

        Raises Refused where it needs what nobody knows with so much room.
        """
        head = self._recording.head
        future = None
        if candidate.preset.replayed:
            sizes = sizes_of(head, AsIs.names, self._read_bytes)
            future = foreseen(self._recording, setting, sizes)
        policies: Policies = candidate.build(setting.slots, future)
        if ring is not None:
            policies = replace(policies, ring=ring)
        sizes = sizes_of(head, policies.precision.names, self._read_bytes)
        known = candidate.known(setting.slots).beforehand(policies)
        setting = setting.of(candidate.preset.name)
        return Replay(self._recording, policies, setting, sizes, known).run()
