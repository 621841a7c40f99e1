"""Layers that run within the native step: allowed beforehand, told to the books afterwards.

Where all of a layer's experts are resident, for good, and nobody looks, the layer asks nothing of
Python but to be counted. So the library runs such layers on its own and notes who was chosen; the
books hear of it at the end of the step, or before the next layer that Python runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from retinue.memory import evaluator
from retinue.memory.cache import ExpertCache
from retinue.metrics import Metrics
from retinue.model.expert_map import ExpertsModule
from retinue.model.kernels import ExpertKernel
from retinue.types import IntArray


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
        """Let the layers of the coming pass run so that never lack an expert; or none."""
        cache = self._cache
        if not (allowed and cache.holds_everything):
            self._allowed[:] = 0
            return
        self._allowed[:] = [cache.has_all(layer) for layer in range(len(self._allowed))]

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
        self._ran, self._seconds = np.zeros(native_layers.layers, dtype=np.int64), np.zeros(1)

    def add(self, module: nn.Module | None, k: int) -> Any | None:
        """A table for `module` without its tensors' places; None: there is no kernel."""
        table = np.zeros(1, dtype=evaluator.LAYER)
        layer = self._native_layers.describe(module, table, k)
        if layer is None:
            return None
        chosen = self._chosen[layer] = np.zeros(self._tokens * k, dtype=np.int64)
        table["tokens"], table["noted"] = self._tokens, chosen.ctypes.data
        table["ran"], table["seconds"] = self._ran[layer:].ctypes.data, self._seconds.ctypes.data
        self._tables.append(table)
        return table

    def forget(self) -> None:
        """A step begins; one that failed may have left something."""
        self._ran[:], self._seconds[0] = 0, 0.0

    def tell(self) -> float:
        """Let the books know of what ran since they heard last; returns the seconds it took."""
        ran: list[int] = self._ran.nonzero()[0].tolist()
        if not ran:  # as mostly where experts are missing: this is asked before every such layer
            return 0.0
        for layer in ran:
            self._native_layers.count(layer, self._chosen[layer])
        seconds = float(self._seconds[0])
        self._native_layers.spend(seconds)
        self.forget()
        return seconds
