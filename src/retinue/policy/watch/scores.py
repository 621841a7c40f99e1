"""How high each expert's scores were of late: a decayed mean of those among the best 2k.

HybriMoE's minus-recent-score (arXiv 2504.05897): S = alpha * TopP(s) + (1 - alpha) * S, with s the
router's scores of a layer and TopP keeping the P largest of them; P = 2k. alpha is not given there;
ours is 0.1, about ten passes. Deviation: of several tokens, the mean of TopP(s).
"""

import numpy as np

from retinue.policy.base import Prompt, Signal, View
from retinue.types import Demand, FloatArray

ALPHA = 0.1


class RecentScores:
    """`scores` [layers, experts] after what has run so far; empty before that."""

    needs: frozenset[Signal] = frozenset({"scores"})

    def __init__(self, alpha: float = ALPHA) -> None:
        assert 0 < alpha <= 1, f"{alpha = }, must be over 0, and 1 at most"
        self._alpha = alpha
        self.scores: FloatArray = np.zeros((0, 0), dtype=np.float32)

    def begin(self, prompt: Prompt) -> None:
        """Requests share the scores."""

    def observe(self, demand: Demand, view: View) -> None:
        """Blend in this layer's scores."""
        if not len(self.scores):
            self.scores = np.zeros((view.layers, view.experts), dtype=np.float32)
        if view.route is None or view.route.scores is None:
            return
        best = _best(view.route.scores, 2 * view.top_k)
        row = self.scores[demand.layer]
        row *= 1 - self._alpha
        row += self._alpha * best

    def end(self, sequence: int) -> None:
        """Requests share the scores."""


def _best(scores: FloatArray, count: int) -> FloatArray:
    """The mean over tokens of `scores` [tokens, experts] with all but the `count` best at 0."""
    experts = scores.shape[1]
    if count < experts:
        kept = np.partition(scores, experts - count, axis=1)[:, experts - count, None]
        scores = np.where(scores >= kept, scores, np.float32(0))
    return np.asarray(scores[0] if len(scores) == 1 else scores.mean(axis=0), dtype=np.float32)
