"""D2MoE's hottest-expert-bits-first: what most tokens wait for is read first.

HEBF of D2MoE (arXiv 2504.15299, section 4.3): every expert has a queue of bit planes, the lowest
first, and the head whose expert has the highest activation frequency is read next. Deviation: an
expert's planes lie one after the other and are one read, so that the queue is one of experts.
"""

import numpy as np

from retinue.policy.base import BoolArray, View
from retinue.types import Demand, IntArray


class FetchHottest:
    """Reads what is needed: by tokens, then by routing weight."""

    exact = True

    def fetch(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """All experts of the demand that are not resident."""
        missing = ~resident
        order = np.lexsort((-demand.weight[missing], -demand.tokens[missing]))
        return demand.experts[missing][order]

    def elsewhere(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """Nothing."""
        return demand.experts[:0]
