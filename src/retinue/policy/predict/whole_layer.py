"""Layer streaming: every expert of the next layer, whether it will be needed or not."""

import numpy as np

from retinue.policy.base import Signal, View
from retinue.types import Demand, Want


class WholeLayer:
    """Forecasts all experts of the coming layer and lets none of their reads be dropped."""

    needs: frozenset[Signal] = frozenset()
    depth = 1
    speculative = False

    def observe(self, demand: Demand, view: View) -> None:
        """Nothing to learn."""

    def forecast(self, view: View) -> list[Want]:
        """Every expert of the next layer, in order."""
        everyone, alike = np.arange(view.experts), np.ones(view.experts, np.float32)
        return [Want(ahead.layer, everyone, alike) for ahead in view.ahead]
