"""Each layer has its own number of slots: layers that have more than their share give first.

Where `rooms` come from is the preset's matter: the same for all, as in DAOP (arXiv 2501.10375), or
a dynamic program's, as in AdapMoE (arXiv 2408.10284). Deviation: the slots are one pool, so a layer
may hold more for a moment, while others do not use theirs.
"""

import numpy as np

from retinue.policy.base import Evictor, View
from retinue.types import FloatArray, IntArray


class Rooms:
    """`inner` says who leaves within a layer; `rooms` [layers] how many may stay there."""

    def __init__(self, inner: Evictor, rooms: IntArray) -> None:
        self._inner, self._rooms = inner, rooms

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The inner order, after that of the entries which their layers have too many of."""
        inner = self._inner.priorities(layers, experts, view)
        rank = np.empty(len(inner), dtype=np.int64)
        rank[np.argsort(inner, kind="stable")] = np.arange(len(inner))
        surplus = np.maximum(view.resident.sum(axis=1) - self._rooms, 0)
        over = np.zeros(len(inner), dtype=bool)
        for layer in np.unique(layers[surplus[layers] > 0]).tolist():
            own = np.flatnonzero(layers == layer)
            over[own[np.argsort(rank[own], kind="stable")[: surplus[layer]]]] = True
        return np.asarray(rank + len(inner) * ~over, dtype=np.float32)
