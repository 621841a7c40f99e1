"""Read-ME: one router before the network chooses a token's experts in every layer.

Read-ME (arXiv 2410.19123, section 3): the model is made from a dense one, with the same expert in
every layer, chosen by one small causal transformer. Deviations, for checkpoints as they are: the
router is trained to say what their own routers say, an expert for each layer; it reads the
first layer's router input, which holds the context, with one hidden layer; the first layer keeps
its own router; and weights are those that each layer's own router gives the chosen.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import BoolArray, Choice, Signal
from retinue.policy.parts.perceptron import whole_path
from retinue.policy.preset import Arrays
from retinue.types import FloatArray


class WholePath:
    """Arrays of the kind `read-me`; every layer with experts but the first obeys them."""

    exact = False
    restricts = False
    needs: frozenset[Signal] = frozenset({"hidden"})

    def __init__(self, arrays: Arrays, routed: Sequence[int]) -> None:
        self._arrays = arrays
        self._rows = {layer: row for row, layer in enumerate(routed)}
        self._said: FloatArray | None = None  # [tokens, rows, experts], of the pass that runs

    def scores(self, layer: int) -> FloatArray | None:
        """What the path says for `layer` in this pass: [tokens, experts]."""
        row = self._rows[layer]
        return None if self._said is None or row == 0 else self._said[:, row]

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        """The path's; in the first layer, which begins it, the router's own."""
        if self._rows[choice.layer] == 0:
            assert choice.hidden is not None, "the preset asks for the hidden states"
            self._said = whole_path(self._arrays, choice.hidden)
            return None
        said = self.scores(choice.layer)
        return None if said is None else np.ascontiguousarray(said[:, : choice.scores.shape[1]])
