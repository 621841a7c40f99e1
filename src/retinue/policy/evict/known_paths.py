"""Belady's rule as far as the pass that runs is known: who is needed last, leaves first.

Read-ME (arXiv 2410.19123, section 4.2): since routes are known before a layer runs, the victim is
the expert whose next use among queued requests is the farthest. Deviation: routes are known of the
pass that runs, not of what waits; what this pass does not need any more goes by recency.
"""

import numpy as np

from retinue.policy.base import BoolArray, View
from retinue.policy.evict.recency import Recency
from retinue.policy.predict.chosen import Chooser
from retinue.types import FloatArray, IntArray


class KnownPaths:
    """What the coming layers of this pass need stays, the next layer's longest."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser, self._recency = chooser, Recency()
        # By layer what was said last, and whom that needs.
        self._needed: dict[int, tuple[FloatArray, BoolArray]] = {}

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """Below 0 by age for what is not needed; else 1 and more, the sooner the more."""
        found = self._recency.priorities(layers, experts, view)
        for layer in range(view.layer + 1, view.layers):
            needed = self._needs(layer, view)
            if needed is not None:
                at = (layers == layer) & needed[experts]
                found[at] = 1 + view.layers - (layer - view.layer)
        return found

    def _needs(self, layer: int, view: View) -> BoolArray | None:
        """Whom the tokens of the pass choose in `layer`: [experts]; None: nobody knows."""
        scores = self._chooser.scores(layer)
        if scores is None:
            return None
        whole = scores if scores.base is None else scores.base  # a part of it is a new object
        said, needed = self._needed.get(layer, (None, None))
        if needed is None or said is not whole:
            needed = np.zeros(view.experts, dtype=bool)
            needed[(-scores).argsort(axis=1, kind="stable")[:, : view.top_k]] = True
            self._needed[layer] = whole, needed
        return needed
