"""When each expert was used last, and how much lately: what evictors go by.

Heat counts tokens that chose an expert. It decays with every token that passes its layer, so that
a pass over many tokens counts as if they had come one by one, evenly mixed.
"""

import numpy as np

from retinue.types import Demand, IntArray

HEAT_DECAY = 0.98  # per token of the layer, see docs/LOG.md


class History:
    """Arrays `[layers, experts]`, which others only read. Steps count forward passes."""

    def __init__(self, layers: int, experts: int) -> None:
        self.last_used = np.full((layers, experts), -1, dtype=np.int64)
        self.heat = np.zeros((layers, experts), dtype=np.float32)

    def mark(self, layer: int, experts: IntArray, step: int) -> None:
        """`experts` are used in `step`."""
        self.last_used[layer, experts] = step

    def touch(self, demand: Demand, tokens: int, step: int) -> None:
        """What a step of `tokens` tokens uses."""
        self.mark(demand.layer, demand.experts, step)
        decay = HEAT_DECAY**tokens
        gain = (1 - decay) / (1 - HEAT_DECAY) / tokens
        heat = self.heat[demand.layer]
        heat *= decay
        heat[demand.experts] += gain * demand.tokens
