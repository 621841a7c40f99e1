"""Look-ahead by the next layer's own router, applied to this layer's input.

The trick of mixtral-offloading (arXiv 2312.17238, section 3.2) and of many since: the residual
stream changes little from layer to layer, so the next router sees almost what it will see. It
costs one small matrix product and no training. Deviation: all tokens of a prefill chunk are
forecast at once, and the experts are ranked by their summed probability over the tokens.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.types import Demand, Want


class NextGate:
    """Forecasts the union of the next layer's likely top experts."""

    needs: frozenset[Signal] = frozenset({"next_scores"})
    speculative = True

    def observe(self, demand: Demand, view: View) -> None:
        """Nothing to learn."""

    def forecast(self, view: View) -> list[Want]:
        """The top-k of each token at the next layer, the most probable in sum first."""
        scores = view.next_scores
        if scores is None:
            return []
        experts = scores.shape[1]
        chosen = np.argpartition(scores, experts - view.top_k, axis=1)[:, -view.top_k :]
        weight = np.zeros(experts, dtype=np.float32)
        np.add.at(weight, chosen, np.take_along_axis(scores, chosen, axis=1))
        order = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
        return [Want(view.next_layer, order, weight[order])]
