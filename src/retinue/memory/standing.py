"""Who may leave the cache, and who leaves first: pins, forecasts, experts that only pass.

Experts that only pass go first, then those that stay, in the evictor's order each; experts of a
forecast are the last of all. Nothing here evicts.
"""

import numpy as np

from retinue.policy.base import BoolArray, Evictor, View
from retinue.types import IntArray


class Standing:
    """How the READY experts in `ready` [layers, experts], which the cache keeps, stand.

    Who is named is named by one number, layer * experts + expert.
    """

    def __init__(self, ready: BoolArray, evictor: Evictor) -> None:
        self._ready, self._evictor = ready, evictor
        self._experts = ready.shape[1]
        self.pins = np.zeros(ready.shape, dtype=np.int32)
        self.expected = np.zeros(ready.shape, dtype=bool)  # better kept until its layer
        self.transient = np.zeros(ready.shape, dtype=bool)  # of what is READY or LOADING
        self.passing = 0  # how many of them

    def passes(self, key: tuple[int, int], transient: bool) -> None:
        """An expert comes, and only passes or not."""
        self.transient[key] = transient
        self.passing += transient

    def stays(self, key: tuple[int, int]) -> None:
        """It does not pass any more, whether it stays or is gone."""
        if self.passing and self.transient[key]:
            self.transient[key] = False
            self.passing -= 1

    def passers(self, count: int, view: View) -> IntArray:
        """Up to `count` experts that only pass and may leave: [n]."""
        if count <= 0 or not self.passing:
            return np.zeros(0, dtype=np.int64)
        idle = self.transient & self._idle() & ~self.expected
        return self._coldest(np.flatnonzero(idle), count, view)

    def victims(self, count: int, allowed: int, view: View, *, spare_expected: bool) -> IntArray:
        """Up to `count` experts, the first to leave first; `allowed` of those that stay: [n]."""
        idle = self._idle()
        found = self._first(idle & ~self.expected, count, allowed, view)
        if len(found) < count and not spare_expected:
            allowed -= int(np.count_nonzero(~self.transient.ravel()[found]))
            more = self._first(idle & self.expected, count - len(found), allowed, view)
            found = np.concatenate([found, more])
        return found

    def _idle(self) -> BoolArray:
        return np.asarray(self._ready & (self.pins == 0))

    def _first(self, idle: BoolArray, count: int, allowed: int, view: View) -> IntArray:
        if not self.passing:
            return self._coldest(np.flatnonzero(idle), min(count, allowed), view)
        passing = self._coldest(np.flatnonzero(idle & self.transient), count, view)
        lacking = min(count - len(passing), allowed)
        staying = np.flatnonzero(idle & ~self.transient)
        return np.concatenate([passing, self._coldest(staying, lacking, view)])

    def _coldest(self, ids: IntArray, count: int, view: View) -> IntArray:
        if not 0 < count < len(ids):
            return ids[: max(count, 0)]
        layers, experts = np.divmod(ids, self._experts)
        priorities = self._evictor.priorities(layers, experts, view)
        return ids[np.argsort(priorities, kind="stable")[:count]]
