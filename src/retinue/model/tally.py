"""What became of the routing of one pass under a set that serves every token, counted at its end.

Layer by layer it would take longer than a small layer's experts do. Passes that fail are counted
up to where they failed, as all counts by layer are.
"""

from dataclasses import dataclass, field

import numpy as np

from retinue.metrics import Metrics
from retinue.model.accounts import Accounts
from retinue.model.restriction import Rerouted
from retinue.policy.miss.book import Served
from retinue.types import FloatArray, IntArray


@dataclass(slots=True)
class _Layers:
    """Layers with arrays of one shape."""

    layers: list[int] = field(default_factory=list)
    rerouted: list[Rerouted] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)


class Tally:
    """Collects a pass's layers. read_bytes: [layers, experts], what reading each expert moves."""

    def __init__(self, metrics: Metrics, accounts: Accounts, read_bytes: IntArray) -> None:
        self._metrics, self._accounts, self._read_bytes = metrics, accounts, read_bytes
        self._passed: dict[tuple[int, ...], _Layers] = {}

    def add(self, layer: int, rerouted: Rerouted, served: Served) -> None:
        """A layer's router chose so, and its book decided so."""
        entry = self._passed.setdefault(rerouted.chosen.shape, _Layers())
        entry.layers.append(layer)
        entry.rerouted.append(rerouted)
        entry.served.append(served)

    def count(self) -> None:
        """Count what was added since the last time."""
        passed, self._passed = self._passed, {}
        for entry in passed.values():
            self._count(entry)

    def _count(self, entry: _Layers) -> None:
        counters, accounts, layers = self._metrics.now, self._accounts, entry.layers
        weights = np.array([each.weights for each in entry.rerouted])  # [layers, tokens, k]
        replaced = np.array([each.replaced for each in entry.rerouted])
        routed = weights.sum(axis=2)
        degraded = (weights * replaced).sum(axis=2)
        missed = np.array([each.missed for each in entry.served])  # [layers, tokens]
        reads = np.array([each.reads for each in entry.served])
        self._weigh(layers, routed, degraded)
        if weights.shape[1] == 1:  # of several tokens, some may want the same
            k = weights.shape[2]
            for layer, absent in zip(layers, missed[:, 0].tolist(), strict=True):
                self._metrics.count(layer, k - absent, 0, absent)
        counters.rerouted += int(np.count_nonzero(replaced))
        lacking, read = missed.sum(axis=1).tolist(), reads.sum(axis=1).tolist()
        for layer, absent, fetched in zip(layers, lacking, read, strict=True):
            self._metrics.count_choices(layer, absent, fetched)
        for layer, each, served in zip(layers, entry.rerouted, entry.served, strict=True):
            if len(served.fetched):
                counters.fetched_bytes += int(self._read_bytes[layer, served.fetched].sum())
            if accounts.prompts:
                accounts.choose(layer, each.chosen, each.weights)
        accounts.serve(layers, routed, degraded)
        accounts.miss(missed.sum(axis=0), reads.sum(axis=0))

    def _weigh(self, layers: list[int], routed: FloatArray, degraded: FloatArray) -> None:
        whole, lost = routed.sum(axis=1), degraded.sum(axis=1)
        for layer, given, other in zip(layers, whole.tolist(), lost.tolist(), strict=True):
            self._metrics.count_weight(layer, given, min(other, given))
