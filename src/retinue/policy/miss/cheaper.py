"""A miss runs where it lies if that is sooner done than reading it.

Fiddler (arXiv 2402.07033): an expert that n tokens chose runs on the CPU if n * t_cpu < t_load, and
is copied otherwise; the authors' constants are 7 ms a token and 70 ms a copy.
"""

from retinue.policy.base import BoolArray, View
from retinue.policy.miss.fetch import heaviest_first
from retinue.types import Demand, IntArray


class CheaperPlace:
    """With one place that computes it is `FetchAll`."""

    exact = True

    def fetch(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """All experts of the demand that are not resident, the heaviest first."""
        return heaviest_first(demand, resident)

    def elsewhere(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """Those whose tokens take less time there than their reading."""
        costs = view.costs
        if costs is None or costs.elsewhere_s is None:
            return demand.experts[:0]
        sooner = demand.tokens * costs.elsewhere_s < costs.read_s
        return demand.experts[~resident & sooner]
