"""Whose scores were lowest of late: HybriMoE's eviction (arXiv 2504.05897)."""

import numpy as np

from retinue.policy.base import View
from retinue.policy.watch.scores import RecentScores
from retinue.types import FloatArray, IntArray


class RecentScore:
    """Goes by `recent`, which somebody else shows what runs."""

    def __init__(self, recent: RecentScores) -> None:
        self._recent = recent

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """S of the expert; all alike before anything ran."""
        if not len(self._recent.scores):
            return np.zeros(len(layers), dtype=np.float32)
        return np.asarray(self._recent.scores[layers, experts])
