"""The reads ahead that shorten the next three layers most, by playing each of them through.

HybriMoE (arXiv 2504.05897): the next three routers on this layer's input say which experts those
layers will need; each candidate's gain is how much sooner its layer would be done if it were
cached, and the largest gains are taken one after the other. Deviations: of a coming layer the k
best experts of each token count, no others; with one place that computes every read gains as much,
itself, so that the nearest layer's most probable experts go first.
"""

import numpy as np

from retinue.policy.base import Costs, Signal, View
from retinue.policy.miss.timelines import play
from retinue.policy.predict.likely import likely
from retinue.types import Demand, FloatArray, Want

DEPTH = 3


class Gain:
    """Forecasts up to twice as many experts as a token needs of a layer, over all layers."""

    needs: frozenset[Signal] = frozenset({"next_scores"})
    depth = DEPTH
    speculative = True

    def observe(self, demand: Demand, view: View) -> None:
        """Nothing to learn."""

    def forecast(self, view: View) -> list[Want]:
        """Those with the largest gain first."""
        asked = [(ahead.layer, ahead.scores) for ahead in view.ahead if ahead.scores is not None]
        wants = [likely(layer, scores, view.top_k) for layer, scores in asked]
        costs = view.costs
        if costs is None or costs.elsewhere_s is None:
            return wants
        layers = [
            _Layer(want, _tokens(scores, want, view.top_k), view)
            for want, (_, scores) in zip(wants, asked, strict=True)
        ]
        return _greedy(layers, costs, 2 * view.top_k)


class _Layer:
    """A coming layer as it is expected: who is needed by how many tokens, and who is there."""

    def __init__(self, want: Want, tokens: list[int], view: View) -> None:
        self.want, self._tokens = want, tokens
        self._cached = view.resident[want.layer, want.experts].tolist()

    def best(self, costs: Costs) -> tuple[float, int]:
        """The largest gain, and the place of the expert in `want`; -1: nobody is missing."""
        now = play(self._tokens, self._cached, costs).seconds
        found = (0.0, -1)
        for place, there in enumerate(self._cached):
            if not there:
                self._cached[place] = True
                gain = now - play(self._tokens, self._cached, costs).seconds
                self._cached[place] = False
                found = max(found, (gain, place), key=lambda pair: pair[0])
        return found

    def take(self, place: int, gain: float) -> Want:
        """Count the expert as cached from now on."""
        self._cached[place] = True
        expert = self.want.experts[place : place + 1]
        return Want(self.want.layer, expert, np.array([gain], dtype=np.float32))


def _greedy(layers: list[_Layer], costs: Costs, count: int) -> list[Want]:
    wants: list[Want] = []
    gains = [layer.best(costs) for layer in layers]
    while len(wants) < count and gains:
        first = max(range(len(layers)), key=lambda at: gains[at][0])
        gain, place = gains[first]
        if gain <= 0:
            break
        wants.append(layers[first].take(place, gain))
        gains[first] = layers[first].best(costs)
    return wants


def _tokens(scores: FloatArray, want: Want, top_k: int) -> list[int]:
    """How many tokens have each of the wanted experts among their best."""
    least = -np.sort(-scores, axis=1)[:, top_k - 1, None]
    return [int(count) for count in np.count_nonzero(scores >= least, axis=0)[want.experts]]
