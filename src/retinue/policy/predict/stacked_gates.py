"""Look-ahead by the routers of several coming layers at once, applied to this layer's input.

mixtral-offloading (arXiv 2312.17238, section 3.2) asks the next layer's router and loads its one or
two best experts; HOBBIT (arXiv 2411.01433) stacks the routers of the next one to three layers, and
goes on to the next one only while nothing is missing. Deviation: of several tokens, each one's best
experts are ranked by the sum of their probabilities.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.predict.likely import likely
from retinue.types import Demand, Want


class StackedGates:
    """The best experts of each of the `depth` coming layers, the nearest layer first.

    count: how many of each token; None: as many as it will choose. until_missing: stop after the
    first layer that lacks one of them.
    """

    needs: frozenset[Signal] = frozenset({"next_scores"})
    speculative = True

    def __init__(
        self, depth: int = 1, count: int | None = None, *, until_missing: bool = False
    ) -> None:
        assert depth >= 1, f"{depth = }, must be 1 or more"
        self.depth, self._count, self._until_missing = depth, count, until_missing

    def observe(self, demand: Demand, view: View) -> None:
        """Nothing to learn."""

    def forecast(self, view: View) -> list[Want]:
        """One `Want` for each layer whose router was asked."""
        wants = []
        for ahead in view.ahead:
            if ahead.scores is None:
                continue
            want = likely(ahead.layer, ahead.scores, self._count or view.top_k)
            wants.append(want)
            if self._until_missing and not np.all(view.resident[ahead.layer, want.experts]):
                break
        return wants
