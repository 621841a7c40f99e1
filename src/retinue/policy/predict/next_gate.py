"""Look-ahead by the next layer's own router, applied to this layer's input.

The trick of mixtral-offloading (arXiv 2312.17238, section 3.2) and of many since: the residual
stream changes little from layer to layer, so the next router sees almost what it will see. It
costs one small matrix product and no training. Deviation: all tokens of a prefill chunk are
forecast at once, and the experts are ranked by their summed probability over the tokens. Asking
the layer after the next as well (recall 0.71 after 0.79 on the sample model) read a quarter more
and gained nothing that could be measured; see docs/LOG.md.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.types import Demand, FloatArray, Want


class NextGate:
    """Forecasts the union of the next layer's likely top experts."""

    needs: frozenset[Signal] = frozenset({"next_scores"})
    depth = 1
    speculative = True

    def observe(self, demand: Demand, view: View) -> None:
        """Nothing to learn."""

    def forecast(self, view: View) -> list[Want]:
        """The top-k of each token at each coming layer, the most probable in sum first."""
        return [
            self._want(ahead.layer, ahead.scores, view.top_k)
            for ahead in view.ahead
            if ahead.scores is not None
        ]

    def _want(self, layer: int, scores: FloatArray, top_k: int) -> Want:
        experts = scores.shape[1]
        chosen = np.argpartition(scores, experts - top_k, axis=1)[:, -top_k:]
        weight = np.zeros(experts, dtype=np.float32)
        np.add.at(weight, chosen, np.take_along_axis(scores, chosen, axis=1))
        order = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
        return Want(layer, order, weight[order])
