"""Each slot goes where it serves the most routing weight, whichever layer that is in.

The routing weight that a set serves is the sum of what its experts serve, so that taking the
highest scores one by one is the best split: nothing is left for a dynamic program. Every layer
has at least as many experts as a token needs.
"""

import numpy as np
import numpy.typing as npt

from retinue.policy.base import BoolArray, Stock
from retinue.policy.place.even import most


def marginal_split(scores: npt.NDArray[np.float64], stock: Stock) -> BoolArray:
    """The highest scores of all layers together. `scores` [layers, experts].

    Of ties what is resident, then the first.
    """
    least = np.minimum(stock.there.sum(axis=1), stock.top_k)
    chosen = most(scores, least, stock.there, stock.resident)
    others = np.flatnonzero(stock.there & ~chosen)
    order = np.lexsort((~stock.resident.ravel()[others], -scores.ravel()[others]))
    left = stock.slots - np.count_nonzero(chosen)
    chosen.ravel()[others[order[: max(left, 0)]]] = True
    return chosen
