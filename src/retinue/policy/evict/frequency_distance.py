"""EdgeMoE's eviction: seldom used, and far from its layer's next turn.

EdgeMoE (arXiv 2308.14352, section 3.4, equation 2): expert j of layer i has the score
-f_ij / ((S - i + I) mod S), with f its activation frequency, S layers and I the one that runs; the
highest leaves. Deviation: printed like that, the next layer's experts have the largest divisor,
though the text keeps what is used soon. Here the divisor is the number of layers until the
expert's turn, from 1 for the next one to S for the one that runs.
"""

import numpy as np

from retinue.policy.base import Prompt, Signal, View
from retinue.types import Demand, FloatArray, IntArray


class FrequencyDistance:
    """It watches by itself: f counts tokens since the start, of all sequences."""

    needs: frozenset[Signal] = frozenset()

    def __init__(self, layers: int, experts: int) -> None:
        self._uses = np.zeros((layers, experts))
        self._tokens = 1.0

    def begin(self, prompt: Prompt) -> None:
        """Nothing to note."""

    def end(self, sequence: int) -> None:
        """Nothing to note."""

    def observe(self, demand: Demand, view: View) -> None:
        """Count the tokens of each expert."""
        self._uses[demand.layer, demand.experts] += demand.tokens
        self._tokens += float(demand.tokens.sum())

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The frequency by the distance."""
        distance = (layers - view.layer - 1) % view.layers + 1
        frequency = self._uses[layers, experts] / self._tokens
        return np.asarray(frequency / distance, dtype=np.float32)
