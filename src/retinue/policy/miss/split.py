"""Misses are divided between the link and a second place that computes, so that both end together.

FreeToken (arXiv 2608.16157), as in its code: of m misses f are read, the integer next to q * m that
makes max(f * (1 - q), (m - f) * q) least, with q = link / (link + processor) from the rates of both
while both work. Those that were active last are read, since they may be needed again. The second
place is used at all only if it computes an expert more than twice as fast as the link brings one.
Deviations: rates are those of the cost model, of an expert with one token, and not measured while
both work; without rates all misses are read, where the code reads one.
"""

import numpy as np

from retinue.policy.base import BoolArray, View
from retinue.policy.miss.fetch import heaviest_first
from retinue.types import Demand, IntArray

WORTH = 2.0  # times the link's rate that the second place has to reach


class SplitMisses:
    """With one place that computes it is `FetchAll`."""

    exact = True

    def fetch(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """All experts of the demand that are not resident, the heaviest first."""
        return heaviest_first(demand, resident)

    def elsewhere(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """The misses that were used the longest time ago, as many as `reads` leaves."""
        costs = view.costs
        missing = demand.experts[~resident]
        if costs is None or costs.elsewhere_s is None or not len(missing):
            return missing[:0]
        link, processor = 1 / costs.read_s, 1 / costs.elsewhere_s
        if processor <= WORTH * link:
            return missing[:0]
        count = len(missing) - reads(len(missing), link / (link + processor))
        oldest = np.argsort(view.last_used[demand.layer, missing], kind="stable")
        return np.sort(missing[oldest[:count]])


def reads(misses: int, share: float) -> int:
    """How many of `misses` are read when the link does `share` of the work."""
    fewer = int(share * misses)
    return min(
        (fewer, fewer + 1), key=lambda read: max(read * (1 - share), (misses - read) * share)
    )
