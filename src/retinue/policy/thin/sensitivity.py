"""AdapMoE's adaptive gating: a token does without its last experts where the layer bears it.

AdapMoE (arXiv 2408.10284, section 4.1, equation 8): of two experts the second is left out where
its normalised weight is below sqrt(T / S_l). S_l is the layer's sensitivity, the sum of squared
gradients (Fisher), T one tolerance for all layers, 0.005 in the authors' script. The first one
then has all the weight. Generalised to k: the ranks from j on are left out where their summed share
is below the same bound, which for k = 2 is the paper's rule. Deviation: the authors' code does so
for single tokens only; here every token is judged by itself, in prompts too.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import BoolArray, Route, Signal, View
from retinue.policy.preset import Arrays
from retinue.policy.ranks import before, shares


class AdaptiveGate:
    """Arrays of the kind `adapmoe`; `tolerance` in place of theirs, 0 leaves nothing out."""

    renormalises = True
    needs: frozenset[Signal] = frozenset()

    def __init__(
        self, arrays: Arrays, routed: Sequence[int], tolerance: float | None = None
    ) -> None:
        bearable = float(arrays["tolerance"][0]) if tolerance is None else tolerance
        self.exact = bearable <= 0
        bounds = np.sqrt(bearable / np.maximum(arrays["sensitivity"], 1e-12))
        self._bounds = dict(zip(routed, bounds.tolist(), strict=True))

    def keep(self, route: Route, view: View) -> BoolArray:
        """Whose share, with all that rank below, reaches the layer's bound; always the first."""
        above = before(shares(route.experts, route.weights, view.experts))
        return np.asarray((1 - above >= self._bounds[route.layer]) | (above == 0))
