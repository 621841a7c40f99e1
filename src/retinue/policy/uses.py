"""What the sequences that run have used so far: counts that evictors share, kept per sequence.

A sequence's counts begin with its first pass and end with it, as HOBBIT (arXiv 2411.01433,
section 3.4) resets them. Where several run, each speaks for its own share of tokens.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retinue.policy.base import Prompt, Signal, View
from retinue.policy.ranks import before, shares
from retinue.types import Demand, FloatArray, IntArray

Counts = npt.NDArray[np.float64]  # [layers, experts]


@dataclass(slots=True)
class _Sequence:
    """One sequence: its tokens so far, and by expert the last token, uses, and high ones."""

    step: int
    tokens: int
    last: Counts
    uses: Counts
    high: Counts


class SequenceUses:
    """`high` is the cumulative weight up to which a use counts as one in high precision."""

    needs: frozenset[Signal] = frozenset()

    def __init__(self, high: float = 1.0) -> None:
        self._high = high
        self._sequences: dict[int, _Sequence] = {}

    def begin(self, prompt: Prompt) -> None:
        """Its counts begin when it is first seen."""
        self._sequences.pop(prompt.sequence, None)

    def end(self, sequence: int) -> None:
        """Forget it."""
        self._sequences.pop(sequence, None)

    def observe(self, demand: Demand, view: View) -> None:
        """Count what each sequence's tokens use in this layer."""
        if (route := view.route) is None:
            return
        score = before(shares(route.experts, route.weights, view.experts))
        if len(route.sequences) == 1:
            one = self._of(int(route.sequences[0]), view, 1)
            self._count(one, route.layer, route.experts[0], score[0])
            return
        for sequence in np.unique(route.sequences).tolist():
            rows = route.sequences == sequence
            one = self._of(sequence, view, int(rows.sum()))
            self._count(one, route.layer, route.experts[rows], score[rows])

    def recent(self, layers: IntArray, experts: IntArray) -> FloatArray:
        """R / T, from 0 for never to 1 for the last token; the mean over sequences."""
        return self._mean(layers, [one.last[layers, experts] / one.tokens for one in self._live()])

    def frequent(self, layers: IntArray, experts: IntArray) -> FloatArray:
        """F / T, the share of tokens that used the expert."""
        return self._mean(layers, [one.uses[layers, experts] / one.tokens for one in self._live()])

    def demanding(self, layers: IntArray, experts: IntArray) -> FloatArray:
        """H / T, the share of tokens that used it in high precision."""
        return self._mean(layers, [one.high[layers, experts] / one.tokens for one in self._live()])

    def _live(self) -> list[_Sequence]:
        return list(self._sequences.values())

    def _mean(self, layers: IntArray, found: list[Counts]) -> FloatArray:
        """Over sequences; 0 for each entry where none runs."""
        if not found:
            return np.zeros(len(layers), dtype=np.float32)
        whole = found[0] if len(found) == 1 else sum(found, np.zeros(len(layers))) / len(found)
        return np.asarray(whole, dtype=np.float32)

    def _of(self, sequence: int, view: View, tokens: int) -> _Sequence:
        """The sequence, with the tokens of this pass counted once."""
        shape = (view.layers, view.experts)
        one = self._sequences.get(sequence)
        if one is None:
            one = _Sequence(-1, 0, np.zeros(shape), np.zeros(shape), np.zeros(shape))
            self._sequences[sequence] = one
        if one.step != view.step:
            one.step = view.step
            one.tokens += tokens
        return one

    def _count(self, one: _Sequence, layer: int, ids: IntArray, own: FloatArray) -> None:
        """`ids` and their scores, of some tokens or of one."""
        valid = ids < one.uses.shape[1]
        high = ids[valid & (own <= self._high)]
        ids = ids[valid]
        one.last[layer, ids] = one.tokens
        np.add.at(one.uses[layer], ids, 1)
        np.add.at(one.high[layer], high, 1)
