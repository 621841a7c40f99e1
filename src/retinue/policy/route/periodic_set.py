"""SwapMoE's virtual experts: a small set serves, and follows what was important lately.

SwapMoE (arXiv 2308.15030): every layer keeps as many experts as memory allows; tokens go only to
those. An expert's importance is what routers gave it lately; every so many tokens the most
important ones become the set, and are read in the background, while the rest serves. Deviations:
importance is routing weight, halved at each change, where the paper multiplies by the norm of what
experts give; the set is changed every `every` tokens, where the paper adapts the pace to the
reading speed; before the first change routers choose as ever.
"""

import numpy as np

from retinue.policy.base import BoolArray, Choice, Signal, View
from retinue.policy.evict.recency import Recency
from retinue.policy.place.even import even_rooms, most
from retinue.types import Demand, FloatArray, IntArray, Want

EVERY = 32  # tokens
KEEP = 0.5  # of the importance, from one set to the next


class PeriodicSet:
    """The set, and the routing that keeps to it: `slots` split evenly, at least k a layer."""

    exact = False
    restricts = False
    needs: frozenset[Signal] = frozenset()

    def __init__(self, shape: tuple[int, int], slots: int, top_k: int, every: int = EVERY) -> None:
        self._slots, self._top_k = slots, top_k
        self._layer, self._every, self._tokens = -1, every, 0
        self.importance = np.zeros(shape)
        self.chosen: BoolArray | None = None  # [layers, experts]

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        """The router's scores with minus infinity for what is not in the set."""
        if choice.layer <= self._layer or self._layer < 0:  # a pass begins
            self._renew(len(choice.scores))
        self._layer = choice.layer
        width = choice.scores.shape[1]
        ids, weights = choice.experts.ravel(), choice.weights.ravel()
        np.add.at(self.importance[choice.layer], ids[ids < width], weights[ids < width])
        if self.chosen is None:
            return None
        serving = self.chosen[choice.layer, :width]
        if serving[choice.experts].all():
            return None
        lowest = np.finfo(np.float32).min
        return np.where(serving, np.maximum(choice.scores, lowest), -np.float32(np.inf))

    def _renew(self, tokens: int) -> None:
        """Change the set where enough tokens have come since the last time."""
        if self._tokens >= self._every:
            there = np.zeros(self.importance.shape, dtype=bool)
            there[self.importance.any(axis=1)] = True
            rooms = np.maximum(even_rooms(self._slots, there), self._top_k)
            self.chosen = most(self.importance, rooms, there, self.chosen)
            self.importance *= KEEP
            self._tokens = 0
        self._tokens += tokens


class SetAhead:
    """Reads what the set lacks in the coming layers, the most important first."""

    needs: frozenset[Signal] = frozenset()
    depth = 2
    speculative = False

    def __init__(self, periodic: PeriodicSet) -> None:
        self._set = periodic

    def observe(self, demand: Demand, view: View) -> None:
        """The routing sees it."""

    def forecast(self, view: View) -> list[Want]:
        """Members of the set that are not resident."""
        wants = []
        for ahead in view.ahead if self._set.chosen is not None else ():
            assert self._set.chosen is not None
            lacking = np.flatnonzero(self._set.chosen[ahead.layer] & ~view.resident[ahead.layer])
            worth = self._set.importance[ahead.layer, lacking]
            order = np.argsort(-worth, kind="stable")
            wants.append(Want(ahead.layer, lacking[order], worth[order].astype(np.float32)))
        return [want for want in wants if len(want.experts)]


class OutsideFirst:
    """Who is not in the set leaves first, then the least recently used."""

    def __init__(self, periodic: PeriodicSet) -> None:
        self._set, self._recency = periodic, Recency()

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """Recency's, far above for the members."""
        found = self._recency.priorities(layers, experts, view)
        if self._set.chosen is not None:
            found = found / (1 + np.abs(found)) + 2 * self._set.chosen[layers, experts]
        return np.asarray(found, dtype=np.float32)
