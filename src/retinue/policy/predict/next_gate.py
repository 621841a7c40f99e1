"""Look-ahead by the next layer's own router, applied to this layer's input.

The trick of mixtral-offloading (arXiv 2312.17238, section 3.2) and of many since: the residual
stream changes little from layer to layer, so the next router sees almost what it will see. It
costs one small matrix product and no training. Deviation: all tokens of a prefill chunk are
forecast at once, and the experts are ranked by their summed probability over the tokens. Asking
the layer after the next as well (recall 0.71 after 0.79 on the sample model) read a quarter more
and gained nothing that could be measured; see docs/LOG.md. A second deviation: where tokens keep to
the experts of the token before, a mistake repeats itself as well, and is not made twice.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.predict.likely import likely
from retinue.types import Demand, Want


class NextGate:
    """Forecasts the union of the next layer's likely top experts."""

    needs: frozenset[Signal] = frozenset({"next_scores"})
    depth = 1
    speculative = True

    def __init__(self) -> None:
        # By layer: the step, and what was forecast in it; of that, what was not needed.
        self._forecast: dict[int, tuple[int, list[int]]] = {}
        self._mistakes: dict[int, tuple[int, set[int]]] = {}

    def observe(self, demand: Demand, view: View) -> None:
        """See which experts of its forecast for this layer and step were not needed."""
        step, experts = self._forecast.get(demand.layer, (-1, []))
        if step == view.step:
            self._mistakes[demand.layer] = step, set(experts).difference(demand.experts.tolist())

    def forecast(self, view: View) -> list[Want]:
        """The top-k of each token at each coming layer, the most probable in sum first."""
        wants = [
            likely(ahead.layer, ahead.scores, view.top_k)
            for ahead in view.ahead
            if ahead.scores is not None
        ]
        if not wants or not view.stands_still:
            return wants
        return [self._without_mistakes(want, view.step) for want in wants]

    def _without_mistakes(self, want: Want, now: int) -> Want:
        experts = want.experts.tolist()
        self._forecast[want.layer] = now, experts
        step, mistakes = self._mistakes.get(want.layer, (-1, set()))
        if step != now - 1 or not mistakes:
            return want
        likely = np.array([expert not in mistakes for expert in experts], dtype=bool)
        return Want(want.layer, want.experts[likely], want.scores[likely])
