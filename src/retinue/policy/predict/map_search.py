"""The experts that the most similar stored pass used, the more of them the less similar it is.

fMoE (arXiv 2502.05370): with s the cosine of the map that was found, delta = clip(1 - s, 0, 1), and
of a coming layer the smallest set of at least k experts whose probabilities p sum to delta or more.
They are read in the order of p / (l - l_now). Deviations: of a batch, the union of its requests'
sets, p summed; and an expert that is needed and not there does not stop what is read ahead, but
overtakes it.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.predict.activation_match import by_score
from retinue.policy.ranks import each_row
from retinue.policy.watch.expert_maps import ExpertMaps
from retinue.types import Demand, FloatArray, Want


class MapSearch:
    """Forecasts from `maps`, which somebody else shows what runs."""

    needs: frozenset[Signal] = frozenset()
    speculative = True

    def __init__(self, maps: ExpertMaps) -> None:
        self._maps, self.depth = maps, maps.distance

    def observe(self, demand: Demand, view: View) -> None:
        """`maps` see it."""

    def forecast(self, view: View) -> list[Want]:
        """The sets of the coming layers, the largest p / (l - l_now) first."""
        if not view.ahead:
            return []
        followed = self._maps.followed(view.layer)
        requests = len(followed[0])
        if not requests:
            return []
        rows, cosines = [], []
        for place, ahead in enumerate(view.ahead):
            by_way = self._maps.foresees(place + 1)
            entries, found = followed if by_way else self._maps.meant()
            rows.append(self._maps.rows(ahead.layer, entries))
            cosines.append(found)
        sets = smallest_sets(np.concatenate(rows), 1 - np.concatenate(cosines), view.top_k)
        layers = [ahead.layer for ahead in view.ahead]
        away = np.array(layers, dtype=np.float32) - view.layer
        scores = sets.reshape(len(layers), requests, -1).sum(axis=1) / away[:, None]
        return by_score(layers, scores, view.experts)


def smallest_sets(rows: FloatArray, delta: FloatArray, least: int) -> FloatArray:
    """`rows` with 0 for whom the smallest set of at least `least` with a sum of `delta` leaves out.

    rows: [requests, experts]; delta: [requests], clipped to between 0 and 1.
    """
    order = each_row(len(rows)), (-rows).argsort(axis=1, kind="stable")
    ranked = rows[order]
    before = ranked.cumsum(axis=1) - ranked  # the sum of those that are better
    taken = before < delta.clip(0, 1)[:, None]
    taken[:, :least] = True
    chosen = np.zeros_like(rows)
    chosen[order] = np.where(taken, ranked, 0)
    return chosen
