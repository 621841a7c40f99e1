"""A forecast that is the routing: a router elsewhere has already chosen for the coming layers.

Pre-gated MoE (arXiv 2308.12066) and Read-ME (arXiv 2410.19123) decide a layer's experts before its
own router could, so that what is read ahead is what will be needed.
"""

from typing import Protocol

import numpy as np

from retinue.policy.base import Signal, View
from retinue.types import Demand, FloatArray, Want


class Chooser(Protocol):
    """Who has chosen."""

    def scores(self, layer: int) -> FloatArray | None:
        """By which the layer will rank its experts: [tokens, experts]; None: not known yet."""
        ...


class Chosen:
    """Reads what `chooser` has chosen, the experts with most tokens first, `depth` layers ahead."""

    needs: frozenset[Signal] = frozenset()
    speculative = False

    def __init__(self, chooser: Chooser, depth: int = 1) -> None:
        self._chooser, self.depth = chooser, depth

    def observe(self, demand: Demand, view: View) -> None:
        """Nothing to learn."""

    def forecast(self, view: View) -> list[Want]:
        """The top k of every token, layer by layer."""
        found = []
        for ahead in view.ahead:
            scores = self._chooser.scores(ahead.layer)
            if scores is not None:
                found.append(_want(ahead.layer, scores, view.top_k))
        return found


def _want(layer: int, scores: FloatArray, top_k: int) -> Want:
    if len(scores) == 1:  # each of them once
        best = (-scores[0]).argsort(kind="stable")[:top_k]
        best.sort()
        return Want(layer, best, np.ones(len(best), dtype=np.float32))
    chosen = (-scores).argsort(axis=1, kind="stable")[:, :top_k]
    tokens = np.bincount(chosen.ravel(), minlength=scores.shape[1])
    order = (-tokens).argsort(kind="stable")[: np.count_nonzero(tokens)]
    return Want(layer, order, tokens[order].astype(np.float32))
