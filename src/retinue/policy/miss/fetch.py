"""Exact: every missing expert is read, the heaviest first."""

import numpy as np
import numpy.typing as npt

from retinue.policy.base import View
from retinue.types import Demand, IntArray


class FetchAll:
    """Reads what is needed, in the order of summed routing weight."""

    exact = True

    def fetch(self, demand: Demand, resident: npt.NDArray[np.bool_], view: View) -> IntArray:
        """All experts of the demand that are not resident."""
        return heaviest_first(demand, resident)

    def elsewhere(self, demand: Demand, resident: npt.NDArray[np.bool_], view: View) -> IntArray:
        """Nothing."""
        return demand.experts[:0]


def heaviest_first(demand: Demand, resident: npt.NDArray[np.bool_]) -> IntArray:
    """The experts of the demand that are not resident, by their summed routing weight."""
    (missing,) = (~resident).nonzero()
    if len(missing) > 1:
        missing = missing[(-demand.weight[missing]).argsort(kind="stable")]
    return demand.experts[missing]
