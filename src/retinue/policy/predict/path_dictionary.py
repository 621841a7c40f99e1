"""EdgeMoE's dictionary of paths: which experts follow those of the last two layers.

EdgeMoE (arXiv 2308.14352, section 3.3): the key is a token's experts in the last two layers, the
value the probability of each expert in the next one; the likely ones are read in this order until
the router has chosen. The paper's models choose one expert a token; with k, the heaviest one of a
layer stands for it. Deviations: where the dictionary has no such path, what the layer uses anyway
counts; only the next layer is asked for.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.predict.trail import Trail
from retinue.policy.preset import Arrays
from retinue.policy.ranks import each_row, shares
from retinue.types import Demand, FloatArray, IntArray, Want


class PathDictionary:
    """`keys`, `ids`, `shares` and `anywhere` of the kind `edgemoe`; `trail` is a watcher."""

    needs: frozenset[Signal] = frozenset()
    depth = 1
    speculative = True

    def __init__(self, arrays: Arrays, routed: Sequence[int], trail: Trail) -> None:
        self._ids = arrays["ids"].astype(np.int64)  # [paths, ways]
        self._shares, self._anywhere, self._trail = arrays["shares"], arrays["anywhere"], trail
        self._rows = {layer: row for row, layer in enumerate(routed)}
        keys = arrays["keys"].astype(np.int64).tolist()
        self._paths = {tuple(key): path for path, key in enumerate(keys)}

    def observe(self, demand: Demand, view: View) -> None:
        """The trail sees it."""

    def forecast(self, view: View) -> list[Want]:
        """The next layer's experts by their summed probability: as many as its tokens choose."""
        routes = self._trail.routes
        if not view.ahead or not routes:
            return []
        row = self._rows[view.ahead[0].layer]
        near = _heaviest(routes[0].experts, routes[0].weights, view.experts)
        far = np.full_like(near, -1)
        if len(routes) > 1:
            far = _heaviest(routes[1].experts, routes[1].weights, view.experts)
        expected = np.zeros(view.experts, dtype=np.float32)
        for key in zip([row] * len(near), far.tolist(), near.tolist(), strict=True):
            self._add(expected, key)
        most = min(view.top_k * len(near), np.count_nonzero(expected))
        order = np.argsort(-expected, kind="stable")[:most]
        return [Want(view.ahead[0].layer, order, expected[order])] if most else []

    def _add(self, expected: FloatArray, key: tuple[int, int, int]) -> None:
        """Add what follows the path `key` to the experts' probabilities."""
        path = self._paths.get(key)
        if path is None:
            expected += self._anywhere[key[0], : len(expected)]
        else:
            ids, known = self._ids[path], self._ids[path] >= 0
            expected[ids[known]] += self._shares[path][known]


def _heaviest(experts: IntArray, weights: FloatArray, count: int) -> IntArray:
    """Each token's expert with the most weight: [tokens]."""
    best = shares(experts, weights, count).argmax(axis=1)
    return np.asarray(experts[each_row(len(best))[:, 0], best])
