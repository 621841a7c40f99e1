"""Decoding replayed over recorded routing: the books of the cache, without memory and time.

The same policies decide over the same facts as in `memory/cache.py` and `model/experts.py` when
they decode; each read is done at once, as if the disk were always quick enough. What one token
needs is looked up, read and counted layer by layer.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from retinue.memory.cache import ABSENT, HEAT_DECAY
from retinue.model.scoring import LayerRouting
from retinue.policy.base import Ahead, BoolArray, View
from retinue.policy.policies import Policies
from retinue.types import Demand, IntArray


class Replay:
    """Counts misses, reads and bytes of a preset; what is resident lasts from text to text.

    read_bytes: [layers, experts], what reading each expert moves, 0 where there is none.
    """

    def __init__(self, policies: Policies, slots: int, top_k: int, read_bytes: IntArray) -> None:
        self._policies, self._slots, self._top_k = policies, slots, top_k
        self._read_bytes = read_bytes
        shape = read_bytes.shape
        self._slot_of: npt.NDArray[np.int32] = np.full(shape, ABSENT, dtype=np.int32)
        self._last_used = np.full(shape, -1, dtype=np.int64)
        self._heat = np.zeros(shape, dtype=np.float32)
        self._expected = np.zeros(shape, dtype=bool)
        self._owner = np.full((slots, 2), -1, dtype=np.int64)
        self._free = list(range(slots - 1, -1, -1))
        self._step = self._layer = 0
        self._whole = slots >= np.count_nonzero(read_bytes)
        self.misses = self.fetched = self.bytes_read = 0

    def run(self, routing: Sequence[LayerRouting]) -> None:
        """Decode one text token by token; `routing` holds every layer with experts, in order."""
        following = [*routing[1:], None]
        for token in range(len(routing[0].experts)):
            self._step += 1
            self._expected[:] = False
            for now, after in zip(routing, following, strict=True):
                self._run_layer(now, after, token)

    def _run_layer(self, now: LayerRouting, after: LayerRouting | None, token: int) -> None:
        demand = _demand(now, token, self._read_bytes.shape[1])
        resident = self._slot_of[now.layer, demand.experts] >= 0
        self.misses += len(resident) - int(resident.sum())
        if self._whole and self._has_all(now.layer):
            return  # nothing ever has to leave, so nobody asks
        self._layer = now.layer
        self._expected[now.layer] = False
        pinned = np.zeros_like(self._expected)
        pinned[now.layer, demand.experts] = True
        view = self._view()
        self._policies.predictor.observe(demand, view)
        for expert in self._policies.miss.fetch(demand, resident, view).tolist():
            self._read(now.layer, expert, pinned, spare_expected=False)
        self._look_ahead(now, after, token, pinned)
        self._touch(demand)

    def _has_all(self, layer: int) -> bool:
        return bool(((self._slot_of[layer] >= 0) | (self._read_bytes[layer] == 0)).all())

    def _look_ahead(
        self, now: LayerRouting, after: LayerRouting | None, token: int, pinned: BoolArray
    ) -> None:
        predictor = self._policies.predictor
        if after is None or predictor.depth < 1:
            return
        scores = None
        asked = "next_scores" in predictor.needs and not self._has_all(after.layer)
        if asked and now.next_scores is not None:
            scores = now.next_scores[token : token + 1]
        for want in predictor.forecast(self._view((Ahead(after.layer, scores),))):
            self._expected[want.layer, want.experts] = True
            under_way = 0
            for expert in want.experts.tolist():
                if self._slot_of[want.layer, expert] >= 0:
                    continue
                if under_way >= 2 * self._top_k:
                    return
                if not self._read(want.layer, expert, pinned, spare_expected=True):
                    return
                under_way += 1

    def _read(self, layer: int, expert: int, pinned: BoolArray, *, spare_expected: bool) -> bool:
        """Read one expert into a free slot, or one that is made free; False: there is no room."""
        if not self._free and not self._evict(pinned, spare_expected):
            return False
        slot = self._free.pop()
        self._slot_of[layer, expert] = slot
        self._owner[slot] = (layer, expert)
        self.fetched += 1
        self.bytes_read += int(self._read_bytes[layer, expert])
        return True

    def _evict(self, pinned: BoolArray, spare_expected: bool) -> bool:
        layers, experts = self._owner[:, 0], self._owner[:, 1]
        idle = ~pinned[layers, experts]
        slots = np.flatnonzero(idle & ~self._expected[layers, experts])
        if not len(slots) and not spare_expected:
            slots = np.flatnonzero(idle)
        if not len(slots):
            return False
        priorities = self._policies.evictor.priorities(layers[slots], experts[slots], self._view())
        slot = int(slots[np.argsort(priorities, kind="stable")[0]])
        self._slot_of[layers[slot], experts[slot]] = ABSENT
        self._owner[slot] = -1
        self._free.append(slot)
        return True

    def _touch(self, demand: Demand) -> None:
        self._last_used[demand.layer, demand.experts] = self._step
        self._heat[demand.layer] *= HEAT_DECAY
        self._heat[demand.layer, demand.experts] += demand.tokens

    def _view(self, ahead: tuple[Ahead, ...] = ()) -> View:
        layers, experts = self._slot_of.shape
        return View(
            step=self._step,
            layer=self._layer,
            phase="decode",
            layers=layers,
            experts=experts,
            top_k=self._top_k,
            slots=self._slots,
            resident=self._slot_of >= 0,
            last_used=self._last_used,
            heat=self._heat,
            ahead=ahead,
        )


def _demand(routing: LayerRouting, token: int, experts: int) -> Demand:
    """What one token needs of one layer."""
    ids, weights = routing.experts[token], routing.weights[token]
    order = np.argsort(ids, kind="stable")
    order = order[ids[order] < experts]
    return Demand(routing.layer, ids[order], np.ones(len(order), np.int64), weights[order])
