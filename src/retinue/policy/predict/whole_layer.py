"""Layer streaming: every expert of the next layer, whether it will be needed or not.

The ring of SE-MoE (arXiv 2205.10034) keeps several layers ahead loaded; FreeToken (2608.16157)
streams layers while it reads prompts, and never while it answers.
"""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.types import Demand, Phase, Want


class WholeLayer:
    """Forecasts all experts of the `depth` coming layers and lets none of their reads be dropped.

    only: the phase in which it does so; None: in both.
    """

    needs: frozenset[Signal] = frozenset()
    speculative = False

    def __init__(self, depth: int = 1, only: Phase | None = None) -> None:
        assert depth >= 1, f"{depth = }, must be 1 or more"
        self.depth, self._only = depth, only

    def observe(self, demand: Demand, view: View) -> None:
        """Nothing to learn."""

    def forecast(self, view: View) -> list[Want]:
        """Every expert of the coming layers, in order."""
        if self._only is not None and view.phase != self._only:
            return []
        everyone, alike = np.arange(view.experts), np.ones(view.experts, np.float32)
        return [Want(ahead.layer, everyone, alike) for ahead in view.ahead]
