"""Whose tokens a pass runs: what the routers chose, and what others served, request by request."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from retinue.metrics import Usage
from retinue.types import FloatArray, IntArray, Phase


class Accounts:
    """The running pass's books by request, in row order; nothing is written while not `on`."""

    def __init__(self, layers: int, experts: int) -> None:
        self._shape = (layers, experts)
        self._starts: IntArray = np.zeros(1, dtype=np.int64)
        self.prompts = False  # whether the pass reads them
        self.on = False
        self.usages: list[Usage] = []

    def begin(self, rows: Sequence[int], phase: Phase) -> None:
        """A pass of `phase` starts, with `rows[i]` tokens of its i-th request."""
        self._starts = np.cumsum([0, *rows[:-1]])
        self.prompts = phase == "prefill"
        self.usages = [Usage.none(*self._shape) for _ in rows] if self.on else []

    def choose(self, layer: int, experts: IntArray, weights: FloatArray) -> None:
        """Count what a layer's router chose; experts, weights: [tokens, k]."""
        if not (self.on and self.prompts):
            return
        bounds = [*self._starts.tolist(), len(experts)]
        for usage, start, stop in zip(self.usages, bounds, bounds[1:], strict=False):
            ids, given = experts[start:stop].ravel(), weights[start:stop].ravel()
            valid = ids < self._shape[1]
            np.add.at(usage.used[layer], ids[valid], given[valid])

    def serve(self, layers: Sequence[int], weights: FloatArray, degraded: FloatArray) -> None:
        """Count routing weight and what of it others served: [len(layers), tokens] each."""
        if not self.on:
            return
        routed, lost = self._sums(weights), self._sums(degraded)
        for at, usage in enumerate(self.usages):
            usage.routed[layers] += routed[:, at]
            usage.degraded[layers] += lost[:, at]

    def miss(self, missed: IntArray, fetched: IntArray) -> None:
        """Count experts that were not there, and of them those that were read: [tokens] each."""
        if not self.on:
            return
        for usage, absent, read in zip(
            self.usages, self._sums(missed), self._sums(fetched), strict=True
        ):
            usage.missed += int(absent)
            usage.fetched += int(read)

    def _sums(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`values` [..., tokens] by request."""
        return np.asarray(np.add.reduceat(values, self._starts, axis=-1))
