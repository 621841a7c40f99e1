"""HOBBIT skips an expert that is missing and adds little to the better ones.

HOBBIT (arXiv 2411.01433, section 3.2): s_i is the sum of the normalised weights that rank above
expert i; one that is missing is left out where s_i > T2 (0.9), which took 3 % of Mixtral's misses.
The others keep their weights. Experts that are on their way count as missing.
"""

import numpy as np

from retinue.policy.base import BoolArray, Route, Signal, View
from retinue.policy.ranks import before, shares

SKIP_ABOVE = 0.9


class MissingTail:
    """`above` is T2; 1 leaves nothing out."""

    renormalises = False
    needs: frozenset[Signal] = frozenset()

    def __init__(self, above: float = SKIP_ABOVE) -> None:
        self._above = above
        self.exact = above >= 1

    def keep(self, route: Route, view: View) -> BoolArray:
        """What is resident, and what is missing and not in the tail."""
        score = before(shares(route.experts, route.weights, view.experts))
        ids = np.minimum(route.experts, view.experts - 1)
        there = view.resident[route.layer, ids] & (route.experts < view.experts)
        return np.asarray(there | (score <= self._above))
