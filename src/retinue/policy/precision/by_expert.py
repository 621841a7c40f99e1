"""EdgeMoE: each expert has its own bit width, chosen once.

EdgeMoE (arXiv 2308.14352, section 3.2): an expert's importance is the accuracy that is lost when it
alone is int2 and all others int4. Two uniform widths that bracket the loss that the user bears are
chosen, and the K least important experts get the lower one; training finds K.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import Signal, View
from retinue.policy.preset import Arrays
from retinue.types import Demand, IntArray, Want

NAMES = {16: "as-is", 8: "int8", 4: "int4", 2: "int2"}


class ByExpert:
    """`bits` [rows, experts] of the kind `edgemoe`: 8, 4, 2, or 16, the checkpoint's own."""

    needs: frozenset[Signal] = frozenset()

    def __init__(self, arrays: Arrays, routed: Sequence[int]) -> None:
        found = arrays["bits"]
        widths = np.array(list(NAMES))
        # What is no width counts as the next wider one.
        given = np.where(widths[:, None, None] >= np.minimum(found, 16), widths[:, None, None], 99)
        chosen = given.min(axis=0)
        used = [bits for bits in NAMES if bits == 16 or (chosen == bits).any()]
        self.names: tuple[str, ...] = tuple(NAMES[bits] for bits in used)
        places = np.array([used.index(bits) if bits in used else 0 for bits in range(17)])
        self._index = dict(zip(routed, places[chosen], strict=True))
        self.exact = len(used) == 1

    def pick(self, demand: Demand, view: View) -> IntArray:
        """The expert's own."""
        return np.asarray(self._index[demand.layer][demand.experts], dtype=np.int64)

    def pick_ahead(self, want: Want, view: View) -> IntArray:
        """The expert's own."""
        return np.asarray(self._index[want.layer][want.experts], dtype=np.int64)
