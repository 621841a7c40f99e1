"""HOBBIT's multidimensional cache: recency, frequency, demanding frequency, layer distance.

HOBBIT (arXiv 2411.01433, section 3.4, equation 3): the least of
w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - ((l_i - l_t + l_n) mod l_n) / l_n)
leaves, with R the token of the last use, F the uses, H those in high precision, all in this
sequence of T tokens, l_i the expert's layer, l_t the one that runs, l_n their number. The weights
add up to 1 and are searched offline; equal ones where nobody did. Deviations: one set of slots for
both precisions; the layer that runs counts as the farthest, since what it needs is pinned; the
distance is counted forward, so that what is due next stays, where the text we read has l_t - l_i.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import View
from retinue.policy.uses import SequenceUses
from retinue.types import FloatArray, IntArray

WEIGHTS = (0.25, 0.25, 0.25, 0.25)  # recency, frequency, demanding frequency, layer distance


class Multidimensional:
    """`uses` is a watcher of the same preset; `weights` as the kind `hobbit` has them."""

    def __init__(self, uses: SequenceUses, weights: Sequence[float] | FloatArray = WEIGHTS) -> None:
        self._uses, self._weights = uses, np.asarray(weights, dtype=np.float64)

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The weighted sum, from 0 to 1."""
        lru, lfu, lhu, fld = self._weights
        distance = (layers - view.layer - 1) % view.layers + 1
        near = 1 - distance / view.layers
        uses = self._uses
        found = lru * uses.recent(layers, experts) + lfu * uses.frequent(layers, experts)
        found = found + lhu * uses.demanding(layers, experts) + fld * near
        return np.asarray(found, dtype=np.float32)
