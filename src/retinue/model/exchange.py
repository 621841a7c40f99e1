"""Brings one layer's slots from where they are to where its book stands, while the layer computes.

Residents that do not stay leave once they are computed, and what was fetched is read into their
slots: first what only passes, then what stays, each once. So a layer needs no slots beyond its own,
and no other layer loses any.
"""

import numpy as np

from retinue.memory.cache import LOADING, ExpertCache
from retinue.policy.base import BoolArray
from retinue.policy.miss.book import Served
from retinue.types import Expert, IntArray


class Exchange:
    """One layer and pass: `advance` says what can be computed. The caller pins the `needed` ones.

    Those that `advance` returned have to be computed and unpinned before it is asked again.
    """

    def __init__(self, cache: ExpertCache, layer: int, served: Served, needed: IntArray) -> None:
        self._cache, self._layer = cache, layer
        cache.begin_layer(layer)
        there, stay = cache.ready[layer].copy(), served.stay
        fetched = served.fetched if len(served.fetched) == 1 else np.unique(served.fetched)
        passing = fetched[~there[fetched] & ~stay[fetched]]
        coming = np.flatnonzero(stay & ~there)
        self._leaving: BoolArray = there & ~stay
        self._leaving[passing] = True
        if len(passing) and not len(coming) and not cache.spare:
            # All that left came back within these tokens: they make room for those that pass.
            coming = fetched[there[fetched]]
            self._leaving[coming] = True
        self._unread = [Expert(layer, expert) for expert in (*passing.tolist(), *coming.tolist())]
        self._todo = set(needed.tolist())
        self.needed = {*self._todo, *coming.tolist()}  # whose reads may not fail

    @property
    def done(self) -> bool:
        """Whether all is computed, and the slots hold what they should."""
        reading = (self._cache.slot_of[self._layer] == LOADING).any()
        return not (self._todo or self._unread or reading)

    def advance(self) -> list[int]:
        """Start the reads that find room; returns what is there and not computed yet.

        That is first what makes room for others.
        """
        cache, layer = self._cache, self._layer
        cache.poll()
        if self._leaving.any():
            leaving = np.flatnonzero(self._leaving).tolist()
            for _, expert in cache.let_go(Expert(layer, expert) for expert in leaving):
                self._leaving[expert] = False
        if self._unread:
            self._unread = cache.read(self._unread)
        ready = [expert for expert in self._todo if cache.slot_of[layer, expert] >= 0]
        if self._unread:
            ready = [expert for expert in ready if self._leaving[expert]] or ready
        self._todo.difference_update(ready)
        return ready
