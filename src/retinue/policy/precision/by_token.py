"""D2MoE: each token asks each of its experts for a number of bits, and planes are shared.

D2MoE (arXiv 2504.15299, section 4.2): a learned router beside each expert chooses a token's bit
width, under capacities: 0.3, 0.4 and 0.3 of the tokens get the highest, the middle and the lowest.
An expert is read in the most bits that any of its tokens wants, as a prefix of one nested record.
Deviations: the width is not learned but goes by the expert's part of its token's weight, whose
quantiles over the tokens just seen are the capacities; the widths are 2, 4 and 8 bits, planes of
one bit being too narrow to read by themselves.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.ranks import shares
from retinue.policy.window import Window
from retinue.types import Demand, FloatArray, IntArray, Want

CAPACITIES = (0.3, 0.4, 0.3)  # of the most bits, fewer, the fewest
SEEN = 1024  # choices of a layer that the quantiles are of


class ByToken:
    """`capacities` of int8, int4 and int2; what they leave to 1 is read as it is."""

    needs: frozenset[Signal] = frozenset()
    names: tuple[str, ...] = ("as-is", "int8", "int4", "int2")

    def __init__(self, capacities: tuple[float, float, float] = CAPACITIES) -> None:
        self._steps = np.cumsum([1 - sum(capacities), *capacities[:-1]])
        self._places = np.clip(1 - self._steps, 0, 1).tolist()
        self._seen: dict[int, Window] = {}
        self._bounds: dict[int, FloatArray] = {}  # by layer, of what has been seen
        self.exact = not sum(capacities)

    def pick(self, demand: Demand, view: View) -> IntArray:
        """The most bits that any token asks for."""
        best = np.zeros(view.experts, dtype=np.float32)
        if view.route is not None:
            ids = view.route.experts
            part = shares(ids, view.route.weights, view.experts)
            valid = ids < view.experts
            seen = part[valid]
            np.maximum.at(best, ids[valid], seen)
            self._see(demand.layer, seen)
        return self._width(demand.layer, best[demand.experts])

    def pick_ahead(self, want: Want, view: View) -> IntArray:
        """The same by the forecast's scores, as if one token had them."""
        whole = max(float(want.scores.sum()), 1e-12)
        return self._width(want.layer, np.asarray(want.scores / whole, dtype=np.float32))

    def _see(self, layer: int, part: FloatArray) -> None:
        if layer not in self._seen:
            self._seen[layer] = Window(SEEN)
        self._seen[layer].extend(part[-SEEN:].tolist())
        self._bounds.pop(layer, None)

    def _width(self, layer: int, part: FloatArray) -> IntArray:
        """0 for the largest parts, as far as the capacities go, and so on."""
        if self.exact or not len(part):
            return np.zeros(len(part), dtype=np.int64)
        bounds = self._bounds.get(layer)
        if bounds is None:
            seen = self._seen.get(layer)
            if seen:
                bounds = self._bounds[layer] = self._quantiles(seen)
            else:  # a layer's first pass goes by itself
                alone = Window(SEEN)
                alone.extend(part[-SEEN:].tolist())
                bounds = self._quantiles(alone)
        return np.asarray((part[:, None] < bounds).sum(axis=1), dtype=np.int64)

    def _quantiles(self, seen: Window) -> FloatArray:
        """Where the steps lie in `seen`, which is not empty."""
        bounds = []
        for place in self._places:
            low, high, part = seen.between(place)
            bounds.append(low + part * (high - low))
        return np.where(self._steps < 1e-9, np.inf, bounds)  # of no capacity nothing is read
