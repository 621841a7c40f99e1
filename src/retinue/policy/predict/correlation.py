"""Experts of the next layer that often follow those of this one: a table of the profile's pairs.

Klotski (arXiv 2502.06888): K hot experts of the next layer are prefetched by a correlation table
over paths of l layers, l = 1. Deviations: K is the model's k, where the paper plans it from a
machine's costs; each of this layer's experts speaks for as many as its tokens; and the table has
the most frequent pairs of each two layers alone, since a profile keeps no others.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.profile import Profile
from retinue.types import Demand, FloatArray, Want


class Correlation:
    """Forecasts the experts of the next layer that are hot after what this one needs."""

    needs: frozenset[Signal] = frozenset()
    depth = 1
    speculative = True

    def __init__(self, profile: Profile) -> None:
        self._follows = follows(profile)
        self._demand: Demand | None = None

    def observe(self, demand: Demand, view: View) -> None:
        """Remember what this layer needs."""
        self._demand = demand

    def forecast(self, view: View) -> list[Want]:
        """The k hottest experts of the next layer, the hottest first."""
        demand = self._demand
        if demand is None or demand.layer != view.layer or not view.ahead:
            return []
        heat = demand.tokens.astype(np.float32) @ self._follows[demand.layer, demand.experts]
        hot = np.argsort(-heat, kind="stable")[: view.top_k]
        hot = hot[heat[hot] > 0]
        return [Want(view.ahead[0].layer, hot, heat[hot])] if len(hot) else []


def follows(profile: Profile) -> FloatArray:
    """How often each expert of the next layer with experts follows one of this layer.

    [layers, experts, experts], of those pairs that the profile has; a row's sum is 1, or 0.
    """
    table = np.zeros((profile.layers, profile.experts, profile.experts), np.float32)
    known = [task.transitions for task in profile.tasks.values() if task.transitions is not None]
    for transitions in known:
        for pair, count in transitions.pairs.items():
            table[pair] += count
    whole = table.sum(axis=2, keepdims=True)
    return np.asarray(table / np.where(whole > 0, whole, 1))
