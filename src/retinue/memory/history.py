"""When each expert was used last, and how much lately: what evictors go by.

Heat counts tokens that chose an expert. It decays with every token that passes its layer, so that
a pass over many tokens counts as if they had come one by one, evenly mixed. What a layer's turn
asks for again and again is also kept in plain lists: a single number of an array costs more.
"""

from collections.abc import Collection, Sequence

import numpy as np

from retinue.types import Demand

HEAT_DECAY = 0.98  # per token of the layer, see docs/LOG.md
_FEW = 16  # experts that are cheaper to write one by one


class History:
    """Arrays `[layers, experts]`, which others only read. Steps count forward passes."""

    def __init__(self, layers: int, experts: int) -> None:
        self.last_used = np.full((layers, experts), -1, dtype=np.int64)
        self.heat = np.zeros((layers, experts), dtype=np.float32)
        self._last = [[-1] * experts for _ in range(layers)]
        # By layer: the step of its last pass, what that used, and how many of the pass before
        # it did not use any more.
        self._passes: list[tuple[int, set[int], int]] = [(-1, set(), 0)] * layers
        self._used = self._left = 0  # the sums over all layers

    @property
    def kept_share(self) -> float:
        """See `View.kept_share`."""
        return 1 - self._left / self._used if self._used else 0.0

    def recent(self, layer: int, experts: Sequence[int], since: int) -> int:
        """How many of `experts` were used in the step `since` or later."""
        last = self._last[layer]
        return sum(1 for expert in experts if last[expert] >= since)

    def mark(self, layer: int, experts: Collection[int], step: int) -> None:
        """`experts` are used in `step`."""
        last = self._last[layer]
        before, used, left = self._passes[layer]
        self._used -= len(used)
        self._left -= left
        now = set(experts)
        if before == step:  # a second turn in the same pass
            left -= sum(1 for expert in now if last[expert] == step - 1)
            now |= used
        else:
            left = len(used - now) if before == step - 1 else 0
        self._passes[layer] = (step, now, left)
        self._used += len(now)
        self._left += left
        for expert in experts:
            last[expert] = step
        if len(experts) <= _FEW:
            for expert in experts:
                self.last_used[layer, expert] = step
        else:
            self.last_used[layer, list(experts)] = step

    def touch(self, demand: Demand, experts: Sequence[int], tokens: int, step: int) -> None:
        """What a step of `tokens` tokens uses: `experts`, as the demand names them."""
        self.mark(demand.layer, experts, step)
        heat = self.heat[demand.layer]
        if tokens == 1:
            heat *= HEAT_DECAY
            heat[demand.experts] += demand.tokens
            return
        decay = HEAT_DECAY**tokens
        gain = (1 - decay) / (1 - HEAT_DECAY) / tokens
        heat *= decay
        heat[demand.experts] += gain * demand.tokens
