"""Heat while tokens choose anew, recency while they keep to the experts of the token before.

A count that fades slowly is right for text: it knows what is used again and again. But where
sequences stand still, as in lists, tables and loops, and then move on, it holds on to what they
have left behind, and drops what they just began to use.
"""

from retinue.policy.base import View
from retinue.policy.evict.heat import Heat
from retinue.policy.evict.recency import Recency
from retinue.types import FloatArray, IntArray


class Pace:
    """Asks `Heat` or `Recency`, whichever suits the last two passes."""

    def __init__(self) -> None:
        self._heat, self._recency = Heat(), Recency()

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The priorities of the one that is asked."""
        chosen = self._recency if view.stands_still else self._heat
        return chosen.priorities(layers, experts, view)
