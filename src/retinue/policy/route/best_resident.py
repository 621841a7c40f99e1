"""DAOP's graceful degradation: of the experts that are missing only the best is worth a read.

DAOP (arXiv 2501.10375, section 4.3): where both of a token's two experts are missing, the better
one is kept and the best resident takes the second one's place; weights are normalised again by the
family's rule. Generalised to k: of the missing the best is kept, every other one is replaced. In
prompts the routers choose as ever.
"""

import numpy as np

from retinue.policy.base import BoolArray, Choice, Signal
from retinue.policy.ranks import each_row
from retinue.types import FloatArray


class BestResident:
    """`kept`: how many of a token's missing experts are read all the same; of `top_k`, if known.

    All of them are exact.
    """

    restricts = False
    needs: frozenset[Signal] = frozenset()

    def __init__(self, kept: int = 1, top_k: int = 0) -> None:
        self._kept = kept
        self.exact = 0 < top_k <= kept

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        """The router's own order, without the missing experts beyond the first `kept`."""
        rows = each_row(len(choice.experts))
        there, own = resident[rows, choice.experts], choice.scores[rows, choice.experts]
        order = rows, (-own).argsort(axis=1, kind="stable")
        missing = ~there[order]
        dropped = np.zeros_like(missing)
        dropped[order] = missing & (missing.cumsum(axis=1) > self._kept)
        if choice.phase == "prefill" or not dropped.any():
            return None
        lowest, highest = np.finfo(np.float32).min, np.float32(np.inf)
        # What is kept comes first, then the residents, then who was chosen but is too far away.
        ranking = np.where(resident, np.maximum(choice.scores, lowest), -highest)
        ranking[rows, choice.experts] = np.where(dropped, lowest, highest)
        return np.asarray(ranking, dtype=np.float32)
