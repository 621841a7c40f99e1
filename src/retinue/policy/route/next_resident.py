"""The next resident expert in the token's own ranking serves where a chosen one is missing.

The miss rule of eMoE (arXiv 2503.06823, section 4.3): nothing is fetched. The paper leaves open
whether weights are normalised again; here the family's own rule sees the chosen experts' own
scores, so it normalises where it always does. Deviation: a family that first chooses groups of
experts chooses them as ever, and residents of the other groups come last, in their order.
"""

import numpy as np

from retinue.policy.base import BoolArray, Choice, Signal
from retinue.types import FloatArray, IntArray

Index = IntArray | tuple[IntArray, IntArray]
LOWEST, HIGHEST = np.finfo(np.float32).min, np.float32(np.inf)


class NextResident:
    """Ranks the router's own choice first, then the other residents as the router does."""

    exact = False
    restricts = True
    needs: frozenset[Signal] = frozenset()

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        """The router's scores with minus infinity for what is not resident."""
        if len(resident) == 1:  # as decoding asks it all the time
            ranking = _ranked(choice.scores[0], choice.experts[0], resident[0])
            return None if ranking is None else ranking[None]
        return _ranked(choice.scores, (np.arange(len(resident))[:, None], choice.experts), resident)


def _ranked(scores: FloatArray, chosen: Index, resident: BoolArray) -> FloatArray | None:
    """The ranking; `chosen` indexes what the router chose in the two others, [.., experts]."""
    there = resident[chosen]
    if there.all():
        return None
    # A resident that the family itself ruled out still comes before what is not there, and
    # what the router chose before what has the same score.
    ranking = np.where(resident, np.fmax(scores, LOWEST), -HIGHEST)
    ranking[chosen] = np.where(there, HIGHEST, -HIGHEST)
    return ranking
