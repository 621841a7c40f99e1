"""Least recently used, counted in forward passes.

Within one pass all uses are equally recent; the layer that was just run leaves before the ones
that are about to run again, since its next turn is the farthest away.
"""

from functools import cache

import numpy as np

from retinue.policy.base import View
from retinue.types import FloatArray, IntArray


class Recency:
    """The classic baseline (LRU); `on-demand` uses it."""

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The step of the last use; ties go by the distance to the layer's next turn."""
        # Ages are small where it matters; float32 could not tell step numbers of a long run apart.
        age = view.step - view.last_used.ravel().take(layers * view.experts + experts)
        far = distances(view.layers, view.layer).take(layers)
        return np.asarray(-(age + far), dtype=np.float32)


@cache
def distances(layers: int, layer: int) -> FloatArray:
    """How many layers pass until each one's turn after `layer`, as parts of all: [layers]."""
    found = (np.arange(layers) - layer - 1) % layers / layers
    return found.astype(np.float32)
