"""Least heat: a decayed count of uses, which recency alone and counts alone both approximate.

The cache keeps `heat[layer, expert]`: at each step of a layer it decays by a constant factor and
the experts used gain one. An expert that was hot for a long time survives a few steps
without use, and one stray use does not displace it.
"""

import numpy as np

from retinue.policy.base import View
from retinue.types import FloatArray, IntArray


class Heat:
    """Decayed frequency; ties go by the distance to the layer's next turn."""

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The expert's heat."""
        distance = (layers - view.layer - 1) % view.layers
        return np.asarray(view.heat[layers, experts] - 1e-6 * distance, dtype=np.float32)
