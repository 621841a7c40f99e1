"""A set by popularity: whom the profile knows as used least leaves first, whatever happens.

Fiddler (arXiv 2402.07033) places the experts that a calibration text used most, and never changes
them. Deviation: the set is not loaded beforehand, it comes together as its experts are used first;
what is read besides holds a slot until the next read needs it.
"""

import numpy as np

from retinue.policy.base import Popularity, View
from retinue.types import FloatArray, IntArray


class ByPopularity:
    """Over all tasks together."""

    def __init__(self, popularity: Popularity) -> None:
        self._shares = popularity.shares(None)

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The expert's share of its layer's routing weight."""
        return np.asarray(self._shares[layers, experts], dtype=np.float32)
