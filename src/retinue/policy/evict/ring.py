"""First in, first out, as a ring of layers: whose next turn is the farthest away leaves first.

The ring memory of SE-MoE (arXiv 2205.10034): when a layer has been computed its buffer is released
and filled with the layer that comes after all those that are loaded. Klotski (arXiv 2502.06888)
frees experts after their use too. Deviation: buffers are as large as an expert, not as a layer.
"""

import numpy as np

from retinue.policy.base import View
from retinue.types import FloatArray, IntArray


class Ring:
    """By layers alone; of one layer's experts those numbered first leave first."""

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """How soon the layer is due, 0 for the one that runs; parts of one by the number."""
        due = (layers - view.layer - 1) % view.layers
        return np.asarray(view.layers - 1 - due + experts / view.experts, dtype=np.float32)
