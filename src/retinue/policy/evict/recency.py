"""Least recently used, counted in forward passes.

Within one pass all uses are equally recent; the layer that was just run leaves before the ones
that are about to run again, since its next turn is the farthest away.
"""

import numpy as np

from retinue.policy.base import View
from retinue.types import FloatArray, IntArray


class Recency:
    """The classic baseline (LRU); `on-demand` uses it."""

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The step of the last use; ties go by the distance to the layer's next turn."""
        distance = (layers - view.layer - 1) % view.layers
        ties = distance / view.layers
        # Ages are small where it matters; float32 could not tell step numbers of a long run apart.
        age = view.step - view.last_used[layers, experts]
        return np.asarray(-age - ties, dtype=np.float32)
