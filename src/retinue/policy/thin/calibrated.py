"""MC-MoE's online pruning: tokens whose first experts carry enough do without the others.

ODP of MC-MoE (arXiv 2410.06270, section 3.3): of two experts the second is left out where
w_1 / w_0 < mu_l, mu_l being the median of that ratio in the layer, so that half of the tokens lose
it; the 2 % of a prompt's tokens that matter most keep both. The weights are normalised again.
Generalised to k: ranks are left out from where the better ones reach the layer's bound, the median
share of the first half of the ranks; for k = 2 that is the paper's rule, as w_0 / (w_0 + w_1)
exceeds 1 / (1 + mu). Deviations: the medians are those of the tokens just seen, not of
a calibration set, so nothing is left out before there are enough; a token's importance is the l1
norm of its hidden state alone, where the paper multiplies by the attention that it receives, which
no policy sees; every layer is pruned, where the authors' code takes the ten that bear it best.
"""

import numpy as np

from retinue.policy.base import BoolArray, Route, Signal, View
from retinue.policy.ranks import before, shares
from retinue.policy.window import Window
from retinue.types import FloatArray

PROTECTED = 0.02  # of a pass's tokens, rounded down: none where there is but one
SEEN = 512  # tokens that a layer's median is of
ENOUGH = 16  # of them, before anything is left out


class CalibratedTail:
    """`quantile` of the tokens lose the second half of their ranks; 0 leaves nothing out."""

    renormalises = True
    needs: frozenset[Signal] = frozenset({"hidden"})

    def __init__(self, quantile: float = 0.5, protected: float = PROTECTED) -> None:
        self._quantile, self._protected = quantile, protected
        self.exact = quantile <= 0
        self._seen: dict[int, Window] = {}

    def keep(self, route: Route, view: View) -> BoolArray:
        """Whose better ones do not reach the bound yet; all of what matters most."""
        part = shares(route.experts, route.weights, view.experts)
        above = before(part)
        bound = self._bound(route.layer, part)
        kept: BoolArray = (above < bound) | (above == 0)
        if int(self._protected * len(kept)):
            kept[self._important(route)] = True
        return kept

    def _bound(self, layer: int, part: FloatArray) -> float:
        """What the first half of the ranks has together, in the tokens seen so far."""
        half = max(1, part.shape[1] // 2)
        first = -np.sort(-part, axis=1)[:, :half].sum(axis=1)
        if layer not in self._seen:
            self._seen[layer] = Window(SEEN)
        seen = self._seen[layer]
        seen.extend(first[-SEEN:].tolist())
        if len(seen) < ENOUGH or self.exact:
            return 2.0  # no share reaches it
        # The larger the quantile of dropped tokens, the smaller the share that is enough.
        low, high, between = seen.between(1 - self._quantile)
        # From the nearer end, as numpy rounds it.
        if between < 0.5:
            return low + (high - low) * between
        return high - (high - low) * (1 - between)

    def _important(self, route: Route) -> BoolArray:
        """The tokens with the largest hidden states: [tokens]."""
        important = np.zeros(len(route.experts), dtype=bool)
        count = int(self._protected * len(important))
        if count and route.hidden is not None:
            norms = np.abs(route.hidden).sum(axis=1)
            important[np.argsort(-norms, kind="stable")[:count]] = True
        return important
