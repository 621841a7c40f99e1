"""Least heat: a decayed count of uses, which recency alone and counts alone both approximate.

The cache keeps `heat[layer, expert]`: at each step of a layer it decays by a constant factor and
the experts used gain one. An expert that was hot for a long time survives a few steps
without use, and one stray use does not displace it.
"""

from retinue.policy.base import View
from retinue.policy.evict.recency import distances
from retinue.types import FloatArray, IntArray

TIE = 1e-6  # a layer of distance


class Heat:
    """Decayed frequency; ties go by the distance to the layer's next turn."""

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The expert's heat."""
        found: FloatArray = view.heat.ravel().take(layers * view.experts + experts)
        found -= (TIE * view.layers) * distances(view.layers, view.layer).take(layers)
        return found
