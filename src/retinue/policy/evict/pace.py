"""Heat while tokens choose anew, recency while they keep to the experts of the token before.

A count that fades slowly is right for text: it knows what is used again and again. But where
sequences stand still, as in lists, tables and loops, and then move on, it holds on to what they
have left behind, and drops what they just began to use. How much they stand still is read from the
last two passes: of the experts that one used, how many the next one used as well.
"""

import numpy as np

from retinue.policy.base import View
from retinue.policy.evict.heat import Heat
from retinue.policy.evict.recency import Recency
from retinue.types import FloatArray, IntArray

STILL = 0.75  # of the experts of a pass; ordinary text keeps a third


class Pace:
    """Asks `Heat` or `Recency`, whichever suits the last two passes."""

    def __init__(self) -> None:
        self._heat, self._recency = Heat(), Recency()

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The priorities of the one that is asked."""
        chosen = self._recency if kept_share(view.last_used) > STILL else self._heat
        return chosen.priorities(layers, experts, view)


def kept_share(last_used: IntArray) -> float:
    """How many of a layer's last experts its pass before used as well, about, over all layers.

    An expert that was used in both passes shows as used in the last one only, so what the pass
    before used and the last one did not is counted. Negative if that was a larger pass, a prefill.
    """
    latest = last_used.max(axis=1, keepdims=True)
    now = np.count_nonzero((last_used == latest) & (latest >= 0))
    left = np.count_nonzero((last_used == latest - 1) & (latest >= 1))
    return 1 - left / now if now else 0.0
