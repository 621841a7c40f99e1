"""Which expert is in which slot: ABSENT -> LOADING -> READY, with pins. The only writer of that.

One int32 array, `slot_of[layer, expert]`, is the truth. The cache asks the evictor who leaves;
the evictor never touches the cache. It belongs to the engine thread: reader threads only fill
slots, and what they finished is taken over in `poll`.

Prefill passes almost every expert through memory. So that it does not flush what decode needs,
what it reads is *transient* but for each layer's quota of the most used experts, and transient
experts make room for each other first. The ring that they may take from the others is bounded.
"""

import time
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from retinue.errors import RetinueError
from retinue.memory.intake import Intake
from retinue.memory.layout import Block, ExpertLayout
from retinue.memory.lease import Lease
from retinue.memory.mover import Mover, Ticket, TicketState, Urgency
from retinue.memory.tier import Tier
from retinue.policy.base import Ahead, Evictor, View
from retinue.types import Demand, Expert, IntArray, Phase, Want

ABSENT, LOADING = -1, -2
HEAT_DECAY = 0.98  # per step of the layer, see docs/LOG.md

Views = dict[str, tuple[Block, ...]]


class ExpertCache:
    """The experts in one tier. `layouts[layer]` is empty for layers without routed experts."""

    def __init__(
        self,
        layouts: Sequence[Sequence[ExpertLayout]],
        tier: Tier,
        mover: Mover,
        evictor: Evictor,
        top_k: int,
    ) -> None:
        self._layouts, self._tier, self._mover, self._evictor = layouts, tier, mover, evictor
        self._intake = Intake(layouts)
        self.top_k = top_k
        self.experts = max(len(row) for row in layouts)
        shape = (len(layouts), self.experts)
        self.slot_of = np.full(shape, ABSENT, dtype=np.int32)
        self.last_used = np.full(shape, -1, dtype=np.int64)
        self.heat = np.zeros(shape, dtype=np.float32)
        self._pins = np.zeros(shape, dtype=np.int32)
        self._expected = np.zeros(shape, dtype=bool)  # forecast, so better kept until its layer
        self._fresh = np.zeros(shape, dtype=bool)  # read and not used yet
        self._owner = np.full((tier.slots, 2), -1, dtype=np.int64)  # READY slots only
        self._transient = np.zeros(tier.slots, dtype=bool)
        self._views: list[Views] = [{}] * tier.slots
        self._loading: dict[Expert, tuple[Ticket, int]] = {}
        self._draining: list[tuple[Ticket, int]] = []  # cancelled while a chunk was being read
        self._failed: dict[Expert, RetinueError] = {}
        self.step, self.layer = 0, 0
        self.phase: Phase = "decode"
        self.total = sum(len(row) for row in layouts)
        moe_layers = sum(1 for row in layouts if row)
        everything = tier.slots >= self.total
        ring = max(min(tier.slots, 2 * top_k), min(self.experts, tier.slots // 4))
        self.ring = 0 if everything else ring
        self.quota = self.experts if everything else (tier.slots - self.ring) // moe_layers
        self.used_bytes_read = 0  # of experts that were read and then used

    @property
    def slots(self) -> int:
        """Slots of the tier."""
        return self._tier.slots

    @property
    def resident(self) -> int:
        """Experts that are READY."""
        return int(np.count_nonzero(self._owner[:, 0] >= 0))

    @property
    def spare(self) -> int:
        """Slots that nobody holds."""
        return self._tier.free

    @property
    def holds_everything(self) -> bool:
        """Whether nothing ever has to leave."""
        return self.slots >= self.total

    def lookup(self, layer: int, experts: IntArray) -> IntArray:
        """Per expert its slot, LOADING or ABSENT: `[n]`."""
        return np.asarray(self.slot_of[layer, experts], dtype=np.int64)

    def read_bytes(self, layer: int, experts: IntArray) -> int:
        """Bytes that reading `experts`, one by one, moves."""
        return sum(self._layouts[layer][expert].read_bytes for expert in experts.tolist())

    def views(self, slot: int) -> Views:
        """The parameters of the READY expert in `slot`."""
        if not self._views[slot]:  # native kernels need addresses alone, so most never ask
            layer, expert = self._owner[slot]
            self._views[slot] = self._layouts[layer][expert].views(self._tier.tensor(slot))
        return self._views[slot]

    def view(self, ahead: tuple[Ahead, ...] = ()) -> View:
        """The facts that policies may see now."""
        return View(
            step=self.step,
            layer=self.layer,
            phase=self.phase,
            layers=len(self._layouts),
            experts=self.experts,
            top_k=self.top_k,
            slots=self.slots,
            resident=self.slot_of >= 0,
            last_used=self.last_used,
            heat=self.heat,
            ahead=ahead,
        )

    # --- the step

    def begin_step(self, phase: Phase) -> None:
        """A forward pass starts."""
        self.step += 1
        self.phase = phase
        self._expected[:] = False

    def begin_layer(self, layer: int) -> None:
        """A layer with experts starts; forecasts for it have served."""
        self.layer = layer
        self._expected[layer] = False
        self.poll()

    def mark_used(self, layer: int, experts: IntArray) -> None:
        """Record that this step uses `experts`; for a layer that never has to evict, enough."""
        self.last_used[layer, experts] = self.step

    def touch(self, demand: Demand, tokens: int) -> None:
        """Record what a step of `tokens` tokens used.

        Heat grows as if the tokens had come one by one, evenly mixed.
        """
        layer, experts = demand.layer, demand.experts
        self.mark_used(layer, experts)
        decay = HEAT_DECAY**tokens
        gain = (1 - decay) / (1 - HEAT_DECAY) / tokens
        self.heat[layer] *= decay
        self.heat[layer, experts] += gain * demand.tokens
        slots = self.slot_of[layer, experts]
        if self.phase == "decode":
            self._transient[slots[slots >= 0]] = False

    def lease(self, layer: int, experts: IntArray) -> Lease:
        """Pin `experts` (resident or to come) so that they stay until released."""
        return Lease(self._pins[layer], experts)

    def use(self, layer: int, experts: Sequence[int] | IntArray) -> IntArray:
        """The slots of READY experts that are now computed; counts their reads as useful."""
        fresh = self._fresh[layer, experts]
        if fresh.any():
            for expert in np.asarray(experts)[fresh].tolist():
                self.used_bytes_read += self._layouts[layer][expert].used_bytes
            self._fresh[layer, experts] = False
        return np.asarray(self.slot_of[layer, experts], dtype=np.int64)

    # --- reading

    def fetch(self, layer: int, experts: IntArray, keep: IntArray | None = None) -> IntArray:
        """Start demand reads in order, as far as there is room; returns those left over.

        Experts that are already on their way move to the front of the queue. `keep` holds the
        experts that may stay after a prefill; the others are transient.
        """
        kept = set() if keep is None else set(keep.tolist())
        for position, expert in enumerate(experts.tolist()):
            key = Expert(layer, expert)
            if key in self._loading:
                ticket, slot = self._loading[key]
                self._mover.raise_urgency(ticket, Urgency.DEMAND)
                self._transient[slot] &= self._is_transient(expert in kept)
            elif self.slot_of[layer, expert] == ABSENT:
                if not self.room(1):
                    self._cancel(lambda key, read: key.layer != layer and read.urgency > 0)
                    if not self.room(1):
                        return experts[position:]
                self._load(key, Urgency.DEMAND, self._is_transient(expert in kept))
        return experts[:0]

    def let_go(self, layer: int, experts: IntArray) -> IntArray:
        """Evict those of `experts` that are READY and not pinned; returns them."""
        slots = self.slot_of[layer, experts]
        free = (slots >= 0) & (self._pins[layer, experts] == 0)
        idle = np.asarray(experts[free], dtype=np.int64)
        for slot in self.slot_of[layer, idle].tolist():
            self._evict(slot)
        return idle

    def read(self, layer: int, experts: IntArray) -> IntArray:
        """Start demand reads in order, into free slots alone; returns those that are left over."""
        absent = experts[self.slot_of[layer, experts] == ABSENT][: self._tier.free]
        for expert in absent.tolist():
            self._load(Expert(layer, expert), Urgency.DEMAND, transient=False)
        return experts[~np.isin(experts, absent)]

    def settle_in(self, layer: int, experts: IntArray) -> None:
        """Let experts that a prefill read ahead stay, as far as there is room for staying ones."""
        slots = self.slot_of[layer, experts]
        for slot in slots[slots >= 0].tolist():
            self._transient[slot] &= self._is_transient(keep=True)

    def want(self, want: Want, limit: int, urgency: Urgency = Urgency.NEXT_LAYER) -> None:
        """Read ahead, if there is room: at most `limit` reads of wants are under way at once."""
        self._expected[want.layer, want.experts] = True
        under_way = sum(1 for ticket, _ in self._loading.values() if ticket.urgency > 0)
        for expert in want.experts.tolist():
            key = Expert(want.layer, expert)
            if key in self._loading:
                self._mover.raise_urgency(self._loading[key][0], urgency)
            elif self.slot_of[want.layer, expert] == ABSENT:
                if under_way >= limit or not self.room(1, spare_expected=True):
                    return
                self._load(key, urgency, self._is_transient(keep=False))
                under_way += 1

    def drop_wants(self, layer: int, needed: IntArray) -> None:
        """Cancel reads for `layer` that turn out not to be needed."""
        keep = set(needed.tolist())
        self._cancel(lambda key, _: key.layer == layer and key.index not in keep)

    def poll(self) -> None:
        """Take over what the readers finished."""
        for key, (ticket, slot) in list(self._loading.items()):
            if not ticket.settled:
                continue
            del self._loading[key]
            if ticket.state is TicketState.DONE:
                self._settle(key, slot)
            else:
                self.slot_of[key] = ABSENT
                self._give(slot)
                if ticket.error is not None:
                    self._failed[key] = ticket.error
        for entry in [entry for entry in self._draining if entry[0].settled]:
            self._draining.remove(entry)
            self._give(entry[1])

    def has_all(self, layer: int) -> bool:
        """Whether every expert of `layer` is resident."""
        return bool((self.slot_of[layer, : len(self._layouts[layer])] >= 0).all())

    def wait(self, timeout_s: float) -> float:
        """Wait until some read settles, or the timeout. Returns the seconds that passed."""
        tickets = [ticket for ticket, _ in (*self._loading.values(), *self._draining)]
        assert tickets, "nothing to wait for: a layer needs more slots than there are"
        started = time.perf_counter()
        self._mover.wait(lambda: any(ticket.settled for ticket in tickets), timeout_s)
        self.poll()
        return time.perf_counter() - started

    def raise_failure(self, layer: int, needed: Collection[int]) -> None:
        """Raise the error of a read that failed for `needed` of `layer`; others are forgotten."""
        wanted = {Expert(layer, index) for index in needed}
        failed = [error for key, error in self._failed.items() if key in wanted]
        self._failed.clear()
        if failed:
            raise failed[0]

    def room(self, count: int, *, spare_expected: bool = False) -> bool:
        """Make `count` slots free, of expected experts last if at all; or change nothing: False."""
        lacking = count - self._tier.free
        if lacking <= 0:
            if self.phase == "prefill":
                self._pass_on(count - self._tier.quick)
            return True
        victims = self._victims(lacking, spare_expected)
        if len(victims) < lacking:
            return False
        for slot in victims.tolist():
            self._evict(slot)
        return True

    def place(self, wanted: npt.NDArray[np.bool_]) -> int:
        """Make exactly `wanted` [layers, experts] resident, between steps; returns bytes read."""
        self.cancel_all()
        while self._draining:
            self.wait(1.0)
        for layer, row in enumerate(wanted):
            self.let_go(layer, np.flatnonzero(~row))
        read_bytes = 0
        for layer, row in enumerate(wanted & (self.slot_of < 0)):
            left = self.read(layer, np.flatnonzero(row))
            assert not len(left), "more experts are wanted than there are slots"
            read_bytes += self.read_bytes(layer, np.flatnonzero(row))
        while self._loading:
            self.wait(1.0)
        self._fresh[wanted] = False  # no step has asked for them
        if self._failed:
            raise self._failed.popitem()[1]
        return read_bytes

    def cancel_all(self) -> None:
        """Cancel every read; after a failed or cancelled step."""
        self._cancel(lambda *_: True)
        self._failed.clear()

    def check(self) -> None:
        """Assert that the books balance. Only between steps, when nothing is pinned."""
        self.poll()
        ready = np.flatnonzero(self._owner[:, 0] >= 0)
        held = len(ready) + len(self._loading) + len(self._draining) + self.spare
        assert held == self.slots, "a slot is lost or held twice"
        assert not self._pins.any(), "an expert is still pinned"
        owners = self._owner[ready]
        assert (self.slot_of[owners[:, 0], owners[:, 1]] == ready).all(), "slot_of and owner differ"
        assert np.count_nonzero(self.slot_of >= 0) == len(ready), "an expert has no slot of its own"
        assert np.count_nonzero(self.slot_of == LOADING) == len(self._loading)

    def _pass_on(self, count: int) -> None:
        """Free slots of experts that only passed, earlier than needed: new pages may be slow."""
        if count > 0:
            passing = np.flatnonzero(self._idle(expected=False) & self._transient)
            for slot in self._coldest(passing, count).tolist():
                self._evict(slot)

    def _idle(self, *, expected: bool) -> npt.NDArray[np.bool_]:
        """Slots with an expert that is not pinned; `expected`: also those of a forecast."""
        layers, experts = self._owner.T
        idle: npt.NDArray[np.bool_] = (layers >= 0) & (self._pins[layers, experts] == 0)
        return idle if expected else idle & ~self._expected[layers, experts]

    def _victims(self, count: int, spare_expected: bool) -> IntArray:
        victims = self._first(self._idle(expected=False), count)
        if len(victims) < count and not spare_expected:
            victims = self._first(self._idle(expected=True), count)
        return victims

    def _first(self, idle: npt.NDArray[np.bool_], count: int) -> IntArray:
        """Up to `count` of the `idle` slots, the first to leave first."""
        passing = np.flatnonzero(idle & self._transient)
        staying = np.flatnonzero(idle & ~self._transient)
        limit = len(staying)
        if self.phase == "prefill":
            limit = max(0, self.ring - int(np.count_nonzero(self._transient)))
        lacking = max(0, min(count - len(passing), limit))
        return np.concatenate([self._coldest(passing, count), self._coldest(staying, lacking)])

    def _coldest(self, slots: IntArray, count: int) -> IntArray:
        if not 0 < count < len(slots):
            return slots[:count]
        owner = self._owner[slots]
        priorities = self._evictor.priorities(owner[:, 0], owner[:, 1], self.view())
        return slots[np.argsort(priorities, kind="stable")[:count]]

    def _is_transient(self, keep: bool) -> bool:
        if self.phase == "decode" or self.holds_everything:
            return False
        held = self.slots - self._tier.free - int(np.count_nonzero(self._transient))
        return not (keep and held < self.slots - self.ring)

    def _load(self, key: Expert, urgency: Urgency, transient: bool) -> None:
        slot = self._tier.take()
        assert slot is not None
        self._failed.pop(key, None)
        layout = self._layouts[key.layer][key.index]
        ticket = self._intake.submit(self._mover, key, layout, self._tier, slot, urgency)
        self._loading[key] = (ticket, slot)
        self.slot_of[key] = LOADING
        self._transient[slot] = transient

    def _settle(self, key: Expert, slot: int) -> None:
        self.slot_of[key] = slot
        self._owner[slot] = (key.layer, key.index)
        self._fresh[key] = True
        self._views[slot] = {}

    def _cancel(self, chosen: Callable[[Expert, Ticket], bool]) -> None:
        for key, (ticket, slot) in list(self._loading.items()):
            if not chosen(key, ticket):
                continue
            del self._loading[key]
            self._mover.cancel(ticket)
            self.slot_of[key] = ABSENT
            if ticket.settled:
                self._give(slot)
            else:
                self._draining.append((ticket, slot))

    def _evict(self, slot: int) -> None:
        layer, expert = self._owner[slot]
        self.slot_of[layer, expert] = ABSENT
        self._fresh[layer, expert] = False
        self._owner[slot] = -1
        self._give(slot)

    def _give(self, slot: int) -> None:
        self._transient[slot] = False
        self._tier.give(slot)
