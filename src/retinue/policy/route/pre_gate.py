"""Pre-gated MoE: each layer's experts are chosen by a gate on the input of the layer before.

Pre-gated MoE (arXiv 2308.12066, section 4.1): block N's pre-gate chooses for block N + 1, the first
block keeps its own gate too, and the model is fine-tuned to it (2^27 tokens). What is read while
block N computes is what block N + 1 needs: there is no misprediction. Deviations: only the
pre-gates are trained, to say what the checkpoint's routers say; the weights of the chosen are those
that the layer's own router gives them.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import BoolArray, Choice, Signal
from retinue.policy.parts.perceptron import pre_gate
from retinue.policy.preset import Arrays
from retinue.types import FloatArray


class PreGate:
    """Arrays of the kind `pre-gated`; every layer with experts but the first obeys them."""

    exact = False
    restricts = False
    needs: frozenset[Signal] = frozenset({"hidden"})

    def __init__(self, arrays: Arrays, routed: Sequence[int]) -> None:
        self._arrays = arrays
        self._rows = {layer: row for row, layer in enumerate(routed)}
        self._said: dict[int, FloatArray] = {}  # by row, of the pass that runs

    def scores(self, layer: int) -> FloatArray | None:
        """What was said for `layer` in this pass: [tokens, experts]."""
        return self._said.get(self._rows[layer])

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        """What the layer before said; of the first layer, its own router's."""
        row, hidden = self._rows[choice.layer], choice.hidden
        assert hidden is not None, "the preset asks for the hidden states"
        if row == 0:
            self._said.clear()
        if row + 1 < len(self._rows):
            self._said[row + 1] = pre_gate(self._arrays, row + 1, hidden)
        said = self._said.get(row)
        width = choice.scores.shape[1]
        return None if said is None or row == 0 else np.ascontiguousarray(said[:, :width])
