"""Random experts serve in some layers: what it costs a task when routing there is wrong.

The randomised routing of eMoE (arXiv 2503.06823, section 3.3). The paper does not say which
weights the drawn experts get; here they have the router's own for them, made by the family's rule.
"""

from collections.abc import Collection

import numpy as np

from retinue.policy.base import BoolArray, Choice, Signal
from retinue.types import FloatArray


class RandomLayers:
    """Ranks at random, anew for each token, in `layers`; the other routers choose themselves."""

    exact = False
    restricts = True
    needs: frozenset[Signal] = frozenset()

    def __init__(self, layers: Collection[int], seed: int = 0) -> None:
        self._layers = frozenset(layers)
        self._random = np.random.default_rng(seed)

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        """Random scores for what is resident: [tokens, experts]."""
        if choice.layer not in self._layers:
            return None
        drawn = self._random.random(choice.scores.shape, dtype=np.float32)
        return np.where(resident, drawn, -np.float32(np.inf))
