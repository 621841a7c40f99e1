"""A quota of slots for each layer, within one pool: who is over it gives first.

The cache of mixtral-offloading (arXiv 2312.17238, section 3.1) keeps the k experts used last in
each layer, with slots of its own for each. Here all layers share the pool, and it fills up whole:
a layer may lend what it does not use, and gets it back as soon as it asks.
"""

from collections.abc import Callable

import numpy as np

from retinue.policy.base import BoolArray, Evictor, View
from retinue.types import FloatArray, IntArray

Quotas = Callable[[View], FloatArray]  # slots of each layer: [layers]


class Even:
    """As many slots for each layer that has ever run; looked for once a decoding pass."""

    def __init__(self) -> None:
        self._pass = -1
        self._quotas = np.zeros(0, dtype=np.float32)

    def __call__(self, view: View) -> FloatArray:
        """`[layers]`."""
        if view.step != self._pass or view.phase == "prefill":
            routed = (view.last_used >= 0).any(axis=1) | view.resident.any(axis=1)
            each = np.float32(view.slots / max(1, int(np.count_nonzero(routed))))
            self._pass, self._quotas = view.step, np.where(routed, each, np.float32(0))
        return self._quotas


def over_quota(quotas: FloatArray, view: View) -> BoolArray:
    """Which layers have to give: `[layers]`.

    The layer that runs gives for itself: it has to as soon as one more would be too much.
    """
    held: FloatArray = np.add.reduce(view.resident, axis=1, dtype=np.float32)
    held[view.layer] += 1
    return np.asarray(held > np.maximum(quotas, 1))


class Quota:
    """Who leaves is for `inner` to say: among the layers over their quota, then among the others.

    quotas: asked at each eviction; the default is `Even`.
    """

    def __init__(self, inner: Evictor, quotas: Quotas | None = None) -> None:
        self._inner, self._quotas = inner, quotas or Even()

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """As `inner` says, but after all entries whose layers are over their quota."""
        found = self._inner.priorities(layers, experts, view)
        behind = 1 + found.max(initial=0) - found.min(initial=0)
        return np.where(over_quota(self._quotas(view), view)[layers], found, found + behind)
