"""What has to be tried on the model itself: its routers, gradients, and lower precisions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retinue.errors import Refused
from retinue.model.whole import WholeModel
from retinue.train import edgemoe
from retinue.train.examples import Example
from retinue.types import FloatArray, IntArray

TEXTS = 16  # that are run, evenly from all
MOST_TOKENS = 512  # of each
Texts = list[list[int]]
Gates = Sequence[tuple[FloatArray, FloatArray]]


@dataclass(frozen=True, slots=True)
class Measures:
    """What is at hand of a model.

    gates: what each row's router says of a hidden state, empty where nobody asked. whole: the
    model in fp32, None where it does not fit. without_last: what loss is added where a row leaves
    out each token's last expert, over the mean square of that one's share: [rows]; None where
    nobody tried.
    """

    gates: Gates = ()
    whole: WholeModel | None = None
    without_last: FloatArray | None = None
    hint: str = "run it on texts with `--data`"

    def sensitivity(self, examples: Sequence[Example]) -> FloatArray:
        """S_l of AdapMoE before it is scaled: [rows]; see `adapmoe.py`."""
        if self.whole is not None:
            return self.whole.squared_gradients(some(examples))
        if self.without_last is None:
            raise self._refused("adapmoe")
        return self.without_last

    def bits(self, examples: Sequence[Example]) -> tuple[FloatArray, FloatArray]:
        """Importance and bits of each expert: [rows, experts] both; see `edgemoe.py`."""
        if self.whole is None:
            raise self._refused("edgemoe")
        texts = some(examples)
        found = edgemoe.importance(self.whole, texts)
        return found, edgemoe.widths(self.whole, texts, found)

    def added(self, examples: Sequence[Example], bits: IntArray) -> float:
        """The loss in nats that `bits` [rows, experts] add."""
        assert self.whole is not None
        texts = some(examples)
        return self.whole.loss(texts, bits) - self.whole.loss(texts)

    def _refused(self, kind: str) -> Refused:
        return Refused(
            f"`{kind}` is tried on the whole model in fp32, which is not there", hint=self.hint
        )


def some(examples: Sequence[Example]) -> Texts:
    """The ids of a few texts, from all over."""
    at = np.unique(np.linspace(0, len(examples) - 1, min(TEXTS, len(examples))).round())
    found = []
    for one in (examples[int(index)] for index in at):
        assert one.ids is not None
        found.append(one.ids[-MOST_TOKENS:].tolist())
    return found
