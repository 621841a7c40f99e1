"""Who may leave the cache, and who leaves first: pins, forecasts, experts that only pass.

Experts that only pass go first, then those that stay, in the evictor's order each; experts of a
forecast are the last of all. Nothing here evicts.
"""

import numpy as np

from retinue.memory.lease import Pins
from retinue.policy.base import BoolArray, Evictor, View
from retinue.types import FloatArray, IntArray

_MANY = 200  # numbers, from which on sorting them all takes longer


class Standing:
    """How the READY experts in `ready` [layers, experts], which the cache keeps, stand.

    Who is named is named by one number, layer * experts + expert.
    """

    def __init__(self, ready: BoolArray, evictor: Evictor) -> None:
        self._ready, self._evictor = ready, evictor
        layers, experts = ready.shape
        self._layers = np.repeat(np.arange(layers), experts)
        self._experts = np.tile(np.arange(experts), layers)
        self.pins: Pins = {}
        self.expected = np.zeros(ready.shape, dtype=bool)  # better kept until its layer
        self.transient = np.zeros(ready.shape, dtype=bool)  # of what is READY or LOADING
        self.passing = 0  # how many of them

    def passes(self, key: tuple[int, int]) -> None:
        """An expert comes that only passes."""
        self.transient[key] = True
        self.passing += 1

    def stays(self, key: tuple[int, int]) -> None:
        """It does not pass any more, whether it stays or is gone."""
        if self.passing and self.transient[key]:
            self.transient[key] = False
            self.passing -= 1

    def passers(self, count: int, view: View) -> IntArray:
        """Up to `count` experts that only pass and may leave: [n]."""
        if count <= 0 or not self.passing:
            return np.zeros(0, dtype=np.int64)
        idle = self._idle() & self.transient & ~self.expected
        return self._coldest(idle, count, view)

    def victims(self, count: int, allowed: int, view: View, *, spare_expected: bool) -> IntArray:
        """Up to `count` experts, the first to leave first; `allowed` of those that stay: [n]."""
        idle = self._idle()
        # Of truth values `>` is "and not", in one operation instead of two.
        found = self._first(idle > self.expected, count, allowed, view)
        if len(found) < count and not spare_expected:
            allowed -= int(np.count_nonzero(~self.transient.ravel()[found]))
            more = self._first(idle & self.expected, count - len(found), allowed, view)
            found = np.concatenate([found, more])
        return found

    def _idle(self) -> BoolArray:
        """Who is READY and not pinned."""
        idle = self._ready.copy()
        flat = idle.ravel()
        for at in self.pins:
            flat[at] = False
        return idle

    def _first(self, idle: BoolArray, count: int, allowed: int, view: View) -> IntArray:
        if not self.passing:
            return self._coldest(idle, min(count, allowed), view)
        passing = self._coldest(idle & self.transient, count, view)
        lacking = min(count - len(passing), allowed)
        return np.concatenate([passing, self._coldest(idle & ~self.transient, lacking, view)])

    def _coldest(self, chosen: BoolArray, count: int, view: View) -> IntArray:
        (ids,) = chosen.ravel().nonzero()
        if not 0 < count < len(ids):
            return ids[: max(count, 0)]
        layers, experts = self._layers[ids], self._experts[ids]
        priorities = self._evictor.priorities(layers, experts, view)
        return ids[least(priorities, count)]


def least(priorities: FloatArray, count: int) -> IntArray:
    """Where the `count` smallest of more numbers are, in order, the first of equals first."""
    if count == 1:
        return np.array([priorities.argmin()])
    if len(priorities) <= _MANY:
        return priorities.argsort(kind="stable")[:count]
    bound = np.partition(priorities, count - 1)[count - 1]
    found = np.flatnonzero(priorities <= bound)
    return found[np.argsort(priorities[found], kind="stable")[:count]]
