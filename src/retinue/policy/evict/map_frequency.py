"""Who is improbable by the map that was found, and was rarely used.

fMoE (arXiv 2502.05370): the largest 1 / (p * freq) leaves first, with p the expert's
probability in the map that guides the prefetching and freq how often it was used. No recency.
Deviation: of a batch, the mean of its requests' maps.
"""

import numpy as np

from retinue.policy.base import View
from retinue.policy.watch.expert_maps import ExpertMaps
from retinue.types import FloatArray, IntArray


class MapFrequency:
    """Goes by `maps`, which somebody else shows what runs."""

    def __init__(self, maps: ExpertMaps) -> None:
        self._maps = maps

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """p * freq; freq alone while no map was found."""
        used = self._maps.used[layers, experts].astype(np.float32)
        entries, _ = self._maps.followed(view.layer)
        if not len(entries):
            return used
        return np.asarray(used * self._maps.means(entries, layers, experts), dtype=np.float32)
