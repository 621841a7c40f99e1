"""Layers that run within the native step: allowed beforehand, told to the books afterwards.

Where all of a layer's experts are resident, for good, and nobody looks, the layer asks nothing of
Python but to be counted. So the library runs such layers on its own and notes who was chosen; the
books hear of it at the end of the step, or before the next layer that Python runs.

Where a lone token's layer may lack an expert, the library begins with those that are there, and
hands the layer over: its other threads compute while Python keeps the books.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from retinue.memory import evaluator
from retinue.memory.cache import ExpertCache
from retinue.metrics import Metrics
from retinue.model.expert_map import ExpertsModule
from retinue.model.kernels import ExpertKernel
from retinue.types import FloatArray, IntArray


@dataclass(slots=True, eq=False)
class Begun:
    """What the library leaves of a layer: who was chosen, and what is to be filled.

    ids, weights: [tokens, k]; hidden: the layer's input, [tokens, hidden]. Of a lone token, `state`
    [1] is BEGUN where rows, fp32 [k, hidden], are to be filled of those who were not there.
    """

    layer: int
    ids: IntArray
    weights: FloatArray
    rows: torch.Tensor
    state: npt.NDArray[np.int32]
    hidden: torch.Tensor

    def describe(self, table: Any) -> None:
        """Write into `table`, an `evaluator.LAYER`, where all that is."""
        table["noted"], table["given"] = self.ids.ctypes.data, self.weights.ctypes.data
        table["rows"], table["state"] = self.rows.data_ptr(), self.state.ctypes.data


class NativeLayers:
    """Which layers of one model may run so, and whether the pass that runs allows it.

    It belongs to the engine's thread.
    """

    def __init__(
        self,
        modules: Sequence[ExpertsModule],
        kernels: Mapping[int, ExpertKernel],
        cache: ExpertCache,
        metrics: Metrics,
    ) -> None:
        self._layers = {id(found.module): found.layer for found in modules}
        self._kernels, self._cache, self._metrics = kernels, cache, metrics
        self._allowed = np.zeros(len(cache.slot_of), dtype=np.int32)

    @property
    def layers(self) -> int:
        """How many layers the model has, with experts or without."""
        return len(self._allowed)

    def allow(self, allowed: bool) -> None:
        """Let the layers of the coming pass run so, or be begun where they may lack an expert."""
        cache = self._cache
        self._allowed[:] = evaluator.BEGIN if allowed else evaluator.OFF
        if allowed and cache.holds_everything:
            whole = [cache.has_all(layer) for layer in range(len(self._allowed))]
            self._allowed[whole] = evaluator.WHOLE

    def describe(self, module: nn.Module | None, table: Any, k: int) -> int | None:
        """Fill in `table`, an `evaluator.LAYER`, what lasts; returns the layer's number.

        None where there is no kernel for it.
        """
        layer = self._layers.get(id(module))
        kernel = None if layer is None else self._kernels.get(layer)
        if layer is None or kernel is None:
            return None
        kernel.describe(table, k)
        table["enabled"] = self._allowed[layer:].ctypes.data
        table["slots"] = self._cache.slot_of[layer].ctypes.data
        return layer

    def width(self, layer: int) -> int:
        """Numbers of a token that a layer's experts take."""
        return self._kernels[layer].width

    def count(self, layer: int, chosen: IntArray) -> None:
        """A layer ran whose tokens chose these; ids of no expert are none."""
        experts = np.unique(chosen[chosen < self._cache.experts])
        self._metrics.count(layer, len(experts))
        self._cache.mark_used(layer, experts)
        self._cache.use(layer, experts)

    def spend(self, seconds: float) -> None:
        """That took so long."""
        self._metrics.now.expert_s += seconds


class StepLog:
    """What the layers of one program note, for the books."""

    def __init__(self, native_layers: NativeLayers, tokens: int) -> None:
        self._native_layers, self._tokens = native_layers, tokens
        self._chosen: dict[int, IntArray] = {}  # by layer: the ids that ran last
        self._tables: list[Any] = []  # which the library reads
        self._rows: dict[tuple[int, int], torch.Tensor] = {}
        self._ran, self._seconds = np.zeros(native_layers.layers, dtype=np.int64), np.zeros(1)

    def add(self, module: nn.Module | None, k: int) -> tuple[Any, Begun] | None:
        """A table for `module` without its tensors' places, and what it leaves to Python.

        None: there is no kernel.
        """
        table = np.zeros(1, dtype=evaluator.LAYER)
        layer = self._native_layers.describe(module, table, k)
        if layer is None:
            return None
        rows = self._rows_of(k, self._native_layers.width(layer))
        ids = np.zeros((self._tokens, k), dtype=np.int64)
        weights, state = np.zeros(ids.shape, dtype=np.float32), np.zeros(1, dtype=np.int32)
        begun = Begun(layer, ids, weights, rows, state, hidden=rows[:0])
        begun.describe(table)
        table["tokens"] = self._tokens
        table["ran"], table["seconds"] = self._ran[layer:].ctypes.data, self._seconds.ctypes.data
        self._chosen[layer] = ids
        self._tables.append(table)
        return table, begun

    def _rows_of(self, k: int, width: int) -> torch.Tensor:
        """The rows of a lone token's layer: one layer after the other fills them."""
        if (k, width) not in self._rows:
            self._rows[k, width] = torch.zeros(k, width)
        return self._rows[k, width]

    def forget(self) -> None:
        """A step begins; one that failed may have left something."""
        self._ran[:], self._seconds[0] = 0, 0.0

    def tell(self) -> float:
        """Let the books know of what ran since they heard last; returns the seconds it took."""
        seconds = float(self._seconds[0])
        if not seconds:
            return 0.0
        for layer in self._ran.nonzero()[0].tolist():
            self._native_layers.count(layer, self._chosen[layer])
        self._native_layers.spend(seconds)
        self.forget()
        return seconds
