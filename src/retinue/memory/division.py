"""How slots are divided in a prefill, between experts that stay and those that only pass."""

import numpy as np

from retinue.types import IntArray


class Division:
    """`slots` slots for `counts` [layers] experts in each layer.

    `ring` is how many experts may have that only pass, `quota` how many of a layer's may stay.
    `whole`: nobody just passes, since everything fits or the evictor alone shall decide.
    """

    def __init__(self, slots: int, counts: IntArray, top_k: int) -> None:
        self._slots, self._counts, self._top_k = slots, counts, top_k
        self._experts = int(counts.max())
        self.whole = slots >= int(counts.sum())
        self.ring, self.quota = 0, self._experts
        if not self.whole:
            self._divide(max(min(slots, 2 * top_k), min(self._experts, slots // 4)))

    def give(self, ring: int) -> None:
        """Another size of the ring: at least what two layers of one token need, at most all."""
        if self._slots >= int(self._counts.sum()):
            return
        ring = max(ring, 2 * self._top_k)
        self.whole = ring >= self._slots
        self._divide(min(ring, self._slots))

    def _divide(self, ring: int) -> None:
        stay = (self._slots - ring) // int(np.count_nonzero(self._counts))
        self.ring, self.quota = ring, self._experts if self.whole else stay
