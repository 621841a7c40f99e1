"""Decoding replayed over recorded routing: the books of the cache, without memory and time.

It drives what the engine itself drives, `memory/attendance.py`; each read is done at once, as if
the disk were always quick enough. What one token needs is looked up, read and counted layer by
layer.
"""

from collections.abc import Sequence

import numpy as np

from retinue.memory.attendance import Attendance, demand_of
from retinue.memory.base import Sizes
from retinue.memory.cache import ExpertCache
from retinue.memory.instant import InstantLink, NumberedSlots
from retinue.metrics import Metrics
from retinue.model.scoring import LayerRouting
from retinue.policy.base import Prompt, Route
from retinue.policy.policies import Policies
from retinue.trace import AHEAD
from retinue.types import FloatArray, IntArray


class Replay:
    """Counts misses, reads and bytes of a preset; what is resident lasts from text to text.

    read_bytes: [layers, experts], what reading each expert moves, 0 where there is none.
    """

    def __init__(self, policies: Policies, slots: int, top_k: int, read_bytes: IntArray) -> None:
        sizes = Sizes(read_bytes[None], read_bytes[None])
        self._link = InstantLink(sizes)
        cache = ExpertCache(sizes, NumberedSlots(slots), self._link, policies.evictor, top_k)
        routed = np.flatnonzero(sizes.there.any(axis=1)).tolist()
        self._metrics = Metrics()
        self._attendance = Attendance(cache, policies, routed, self._metrics)
        self.misses = 0

    @property
    def fetched(self) -> int:
        """Experts that were read."""
        return self._link.reads

    @property
    def bytes_read(self) -> int:
        """Bytes of those."""
        return self._link.bytes_read

    def run(self, routing: Sequence[LayerRouting], prompt: Prompt, ids: IntArray) -> None:
        """Decode one text token by token; `routing` holds every layer with experts, in order.

        prompt: the request that it is shown as, which no other is; ids: [tokens], the whole text's.
        """
        counters = self._metrics.begin("decode")
        self._attendance.begin(prompt)
        for token in range(len(ids)):
            self._attendance.begin_pass("decode")
            for at, now in enumerate(routing):
                route = _route(now, prompt.sequence, ids, token)
                self._run_layer(now, routing[at + 1 :], token, route)
        self._attendance.end(prompt.sequence)
        self.misses += counters.misses + counters.pending

    def _run_layer(
        self, now: LayerRouting, coming: Sequence[LayerRouting], token: int, route: Route
    ) -> None:
        cache = self._attendance.cache
        rows = slice(token, token + 1)
        demand = demand_of(now.layer, route.experts, route.weights, cache.experts)
        if cache.holds_everything and cache.has_all(now.layer):
            self._attendance.see(demand, route)
            return

        def scores_of(layer: int) -> FloatArray | None:
            if layer == now.layer:
                return None if now.scores is None else now.scores[rows]
            for name, further in zip(AHEAD, coming, strict=False):
                if further.layer == layer:
                    return now.ahead[name][rows] if name in now.ahead else None
            return None

        with self._attendance.attend(demand, 1, route, scores_of) as turn:
            while turn.left:
                if ready := turn.ready():
                    turn.computed(ready)
                else:
                    turn.wait()


def _route(now: LayerRouting, sequence: int, ids: IntArray, token: int) -> Route:
    rows = slice(token, token + 1)
    scores = None if now.scores is None else now.scores[rows]
    hidden = None if now.hidden is None else now.hidden[rows]
    owner = np.array([sequence])
    return Route(now.layer, now.experts[rows], now.weights[rows], owner, scores, hidden, ids[rows])
