"""Who was used least by the requests that run, with the early layers staying longer.

MoE-Infinity (arXiv 2401.14361): the smallest (count + eps) / n * (1 - l / L) leaves, with count the
tokens of the request that went to the expert in layer l of L, and n all its tokens there. The early
layers stay since nothing foretells them. eps, whose size we chose, lets the layer decide among what
was not used yet. Deviation: of a batch, the sum of its requests' matrices.
"""

import numpy as np

from retinue.policy.base import View
from retinue.policy.watch.activations import Activations
from retinue.types import FloatArray, IntArray

EPS = 1e-4


class Activation:
    """Goes by `activations`, which somebody else shows what runs."""

    def __init__(self, activations: Activations) -> None:
        self._activations = activations

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The paper's priority."""
        counts = self._activations.counts
        whole = np.maximum(counts.sum(axis=1), 1)
        ratio = (counts[layers, experts] + EPS) / whole[layers]
        return np.asarray(ratio * (1 - layers / view.layers), dtype=np.float32)
