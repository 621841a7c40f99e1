"""Slots by predicted demand: a layer has as many as it will need, and keeps the most probable.

ExpertFlow's predictive locality-aware caching (arXiv 2410.17954): slots of a layer are proportional
to the experts that the batch is predicted to use there. Within the layers that are over their quota
the least probable leaves, then of the others. Deviation: the paper also gives the slots of a layer
that is done to the next one, whatever the next token may need of it; here they stay until another
layer asks. Without a prediction it is the least recently used, with as many slots for each layer.
"""

import numpy as np

from retinue.policy.base import View
from retinue.policy.evict.quota import Quota, over_quota
from retinue.policy.evict.recency import Recency
from retinue.policy.watch.paths import Paths
from retinue.types import FloatArray, IntArray


class PredictedQuota:
    """Goes by `paths`, which somebody else shows what runs."""

    def __init__(self, paths: Paths) -> None:
        self._paths, self._plain = paths, Quota(Recency())

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The chance of being needed, and one more within the quota."""
        needed = self._paths.needed
        if needed is None:
            return self._plain.priorities(layers, experts, view)
        distinct = needed.sum(axis=1)
        quotas = view.slots * distinct / max(1e-9, float(distinct.sum()))
        kept = ~over_quota(quotas.astype(np.float32), view)[layers]
        return np.asarray(needed[layers, experts] + 2 * kept, dtype=np.float32)
