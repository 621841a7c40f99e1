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


def even(view: View) -> FloatArray:
    """As many slots for each layer that has ever run: `[layers]`."""
    routed = (view.last_used >= 0).any(axis=1) | view.resident.any(axis=1)
    each = np.float32(view.slots / max(1, int(np.count_nonzero(routed))))
    return np.where(routed, each, np.float32(0))


def over_quota(quotas: FloatArray, view: View) -> BoolArray:
    """Which layers have to give: `[layers]`.

    The layer that runs gives for itself: it has to as soon as one more would be too much.
    """
    held: FloatArray = np.add.reduce(view.resident, axis=1, dtype=np.float32)
    held[view.layer] += 1
    return np.asarray(held > np.maximum(quotas, 1))


class Quota:
    """Who leaves is for `inner` to say: among the layers over their quota, then among the others.

    quotas: asked at each eviction; the default is `even`.
    """

    def __init__(self, inner: Evictor, quotas: Quotas = even) -> None:
        self._inner, self._quotas = inner, quotas

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The rank by `inner`, after that of all entries whose layers are over their quota."""
        inner = self._inner.priorities(layers, experts, view)
        order = inner.argsort(kind="stable")
        ranked = inner[order]
        rank = np.zeros(len(inner), dtype=np.float32)
        rank[order[1:]] = (ranked[1:] != ranked[:-1]).cumsum()  # of equals the same
        rank[~over_quota(self._quotas(view), view)[layers]] += np.float32(len(layers))
        return rank
