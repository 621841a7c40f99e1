"""When a set is placed anew: for other requests than before, and when a forecast is due.

eMoE (arXiv 2503.06823, section 4.1) forecasts every `period` prompts; `rhythm.py` says when that is
sooner. The engine and replays ask here before each pass, and place what they are told to. It knows
neither slots nor time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retinue.policy.base import BoolArray, Placement, Running
from retinue.policy.place.rhythm import Drift, Rhythm
from retinue.policy.place.tables import Shares, Tables
from retinue.policy.policies import Policies
from retinue.types import FloatArray

KEEP_BELOW = 0.5  # of `fetch_above`: beyond it fetching is too rare to mend a set, see docs/LOG.md
PERIOD = 40  # prompts between two forecasts where nobody says, as in the paper


@dataclass(frozen=True, slots=True)
class Occasion:
    """Other requests run, or a forecast was made. `places`: the set is to be chosen anew.

    Else it stays, and only who leaves first is another. `key` is what it is for.
    """

    places: bool
    key: list[Running]


def occasions_of(policies: Policies, tables: Tables, period: int | None) -> "Occasions":
    """Those of a preset; `period` None: 40 prompts."""
    rhythm = Rhythm(period or PERIOD, impatient=policies.impatient)
    keeps = policies.impatient and policies.fetch_above < KEEP_BELOW
    return Occasions(policies.placement, tables, rhythm, keeps=keeps)


class Occasions:
    """Asks the forecaster behind `tables` anew when `rhythm` says so.

    `keeps`: other requests find the set as it is, until the next forecast.
    """

    def __init__(
        self, placement: Placement, tables: Tables, rhythm: Rhythm, *, keeps: bool = False
    ) -> None:
        self._placement, self._tables, self._keeps = placement, tables, keeps
        self._rhythm, self._drift = rhythm, Drift()
        self.placed: list[Running] | None = None  # what the set is for, as `Occasion.key` says it
        self.settled = False  # whether the requests asked for last leave nothing to be done

    @property
    def period(self) -> int | None:
        """Prompts between two forecasts; None where nothing is forecast."""
        return self._rhythm.period if self._placement.periodic else None

    @property
    def own(self) -> bool:
        """Whether each answer has a set of its own, which its prompt says."""
        return self._tables.own

    def begin(self, running: Sequence[Running]) -> Occasion | None:
        """These requests run next; None: their set is there. What is placed is for the caller."""
        fresh = sum(request.new for request in running)
        unheard = not all(self._tables.knows(request.task) for request in running)
        due = fresh > 0 and self._placement.periodic and (self._tables.own or self._rhythm.due)
        key, found = self.key(running), None
        if key != self.placed or due:
            if due:
                self._tables.renew()
                self._drift.reset()
                self._rhythm.forecast()
            found = Occasion(due or self.placed is None or not self._keeps, key)
        if unheard:
            self._rhythm.change()
        self._rhythm.count(fresh)
        self.settled = not (fresh or unheard)
        return found

    def observe(self, task: str | None, used: FloatArray, there: BoolArray) -> None:
        """A prompt of `task` was read: what its own routers chose, and what was there."""
        self._drift.observe(self._tables.shares(task), used, there)
        self._tables.observe(task, used)
        if self._drift.due:
            self._drift.reset()
            self._rhythm.change()
        if self._tables.own:
            self.placed = None  # its answer has a set of its own

    def key(self, running: Sequence[Running]) -> list[Running]:
        """What decides: the requests in any order, if the placement asks for them."""
        if not self._placement.by_task:
            return []
        each = [replace(request, new=False) for request in running]
        return sorted(each, key=lambda one: (str(one.task), one.prompt_tokens, one.answer_tokens))

    def popularity(self, running: Sequence[Running]) -> Shares:
        """Each expert's share of routing weight, mean over the requests: [layers, experts]."""
        known = [self._tables.shares(request.task) for request in running or (Running(None),)]
        return np.asarray(np.mean(known, axis=0))
