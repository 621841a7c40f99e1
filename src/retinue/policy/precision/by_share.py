"""HOBBIT's precision of a miss: high for what its tokens lean on, low for the rest.

HOBBIT (arXiv 2411.01433, section 3.2): a missing expert whose better-ranked ones have s_i <= T1
(0.6) of the token's normalised weight is read in high precision, others in low. 67, 30 and 3 % of
Mixtral's misses were high, low and skipped (`thin/missing_tail.py` skips). Here high is the
checkpoint's own and low int4. Deviation: an expert that several tokens need is read as the most
demanding of them wants it; experts of both precisions share the slots.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.ranks import before, shares
from retinue.types import Demand, FloatArray, IntArray, Want

HIGH_UP_TO = 0.6


class ByShare:
    """`high` is T1; 1 reads everything as it is."""

    names: tuple[str, ...] = ("as-is", "int4")
    needs: frozenset[Signal] = frozenset()

    def __init__(self, high: float = HIGH_UP_TO) -> None:
        self._high = high
        self.exact = high >= 1

    def pick(self, demand: Demand, view: View) -> IntArray:
        """Low where no token wants it high."""
        least = np.ones(view.experts, dtype=np.float32)
        if view.route is not None:
            ids = view.route.experts
            score = before(shares(ids, view.route.weights, view.experts))
            valid = ids < view.experts
            np.minimum.at(least, ids[valid], score[valid])
        return self._low(least[demand.experts])

    def pick_ahead(self, want: Want, view: View) -> IntArray:
        """The same by the forecast's scores, as if one token had them."""
        chosen = want.scores[None, :]
        ids = np.arange(chosen.shape[1])[None, :]
        return self._low(before(shares(ids, chosen, chosen.shape[1]))[0])

    def _low(self, score: FloatArray) -> IntArray:
        return np.asarray(score > self._high, dtype=np.int64)
