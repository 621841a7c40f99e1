"""What the earlier request that is most like this one used in the coming layers.

MoE-Infinity (arXiv 2401.14361): score(l, e) = p(l, e) * (1 - (l - i) / L), with i the layer that
runs, L the number of layers and p the row of the matched matrix divided by its sum. Deviations:
three layers ahead, since what is farther would only wait in the queue; and of a layer at most as
many experts as its tokens can choose, where the paper queues all that were ever used.
"""

from itertools import pairwise

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.ranks import each_row
from retinue.policy.watch.activations import Activations
from retinue.types import Demand, FloatArray, Want

DEPTH = 3


class ActivationMatch:
    """Forecasts from `activations`, which somebody else shows what runs."""

    needs: frozenset[Signal] = frozenset()
    depth = DEPTH
    speculative = True

    def __init__(self, activations: Activations) -> None:
        self._activations = activations

    def observe(self, demand: Demand, view: View) -> None:
        """`activations` see it."""

    def forecast(self, view: View) -> list[Want]:
        """The experts of the coming layers, the largest score first, whatever their layer."""
        shares = self._activations.expected()
        if shares is None or not view.ahead:
            return []
        layers = np.array([ahead.layer for ahead in view.ahead])
        near = 1 - (layers - view.layer) / view.layers
        scores = np.asarray(shares[layers] * near[:, None], dtype=np.float32)
        count = min(view.experts, view.top_k * self._activations.requests)
        return by_score(layers.tolist(), scores, count)


def by_score(layers: list[int], scores: FloatArray, count: int) -> list[Want]:
    """At most `count` experts of each layer, the best of all layers first.

    scores: [layers, experts]; 0 or less is not wanted. A `Want` for each stretch of one layer.
    """
    best = (-scores).argsort(axis=1, kind="stable")[:, :count]
    values = scores[each_row(len(best)), best].ravel()
    order = (-values).argsort(kind="stable")[: np.count_nonzero(values > 0)]
    rows, experts, values = order // best.shape[1], best.ravel()[order], values[order]
    if not len(rows):
        return []
    cuts = [0, *((rows[1:] != rows[:-1]).nonzero()[0] + 1).tolist(), len(rows)]
    return [
        Want(layers[rows[start]], experts[start:stop], values[start:stop])
        for start, stop in pairwise(cuts)
    ]
