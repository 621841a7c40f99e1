"""Which expert is in which slot: ABSENT -> LOADING -> READY, with pins. The only writer of that.

One int32 array, `slot_of[layer, expert]`, is the truth. The cache asks the evictor who leaves;
the evictor never touches the cache. It belongs to the engine thread: whoever reads only fills
slots, and what was finished is taken over in `poll`. It knows slots and a link, whose time and
bytes may be real or simulated.

Prefill passes almost every expert through memory. So that it does not flush what decode needs,
what it reads is *transient* but for each layer's quota of the most used experts, and transient
experts make room for each other first. The ring that they may take from the others is bounded.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from retinue.memory.base import Link, Sizes, Slots, Ticket, Urgency
from retinue.memory.division import Division
from retinue.memory.history import History
from retinue.memory.lease import Lease
from retinue.memory.reads import Reads
from retinue.memory.standing import Standing
from retinue.policy.base import Ahead, Costs, Evictor, Route, View
from retinue.types import Demand, Expert, FloatArray, IntArray, Phase, Want

ABSENT, LOADING = -1, -2
NONE = -3  # a layer with fewer experts than another has no such expert


class ExpertCache:
    """The experts in equal slots. `sizes` says which there are, `link` reads them."""

    def __init__(
        self, sizes: Sizes, slots: Slots, link: Link, evictor: Evictor, top_k: int
    ) -> None:
        self.sizes, self.top_k = sizes, top_k
        self._read_bytes: list[list[list[int]]] = sizes.read_bytes.tolist()
        self.costs: Costs | None = None  # shown to policies, where somebody knows them
        self._slots = slots
        layers, self.experts = shape = sizes.there.shape
        self.slot_of = np.where(sizes.there, ABSENT, NONE).astype(np.int32)
        # The same in plain lists, where one number costs less than one of an array.
        self.rows: list[list[int]] = self.slot_of.tolist()
        self.ready = np.zeros(shape, dtype=bool)
        self.precision = np.zeros(shape, dtype=np.int64)  # of what is READY or LOADING
        self.history = History(layers, self.experts)
        self._standing = Standing(self.ready, evictor)
        self._fresh: set[tuple[int, int]] = set()  # read and not used yet
        self.reads = Reads(link, layers)
        self.step, self.layer = 0, 0
        self.phase: Phase = "decode"
        self._view: View | None = None  # of the layer that runs
        counts = sizes.there.sum(axis=1)
        self._lacking: list[int] = counts.tolist()  # by layer, experts that are not READY
        self.total, self.resident = int(counts.sum()), 0
        self.division = Division(slots.slots, counts, top_k)
        self.holds_everything = slots.slots >= self.total  # so that nothing ever has to leave
        self.used_bytes_read = 0  # of experts that were read and then used

    @property
    def slots(self) -> int:
        """Slots in all."""
        return self._slots.slots

    @property
    def spare(self) -> int:
        """Slots that nobody holds."""
        return self._slots.free

    @property
    def last_used(self) -> IntArray:
        """The step in which each expert was used last, -1: never: `[layers, experts]`."""
        return self.history.last_used

    @property
    def heat(self) -> FloatArray:
        """Each expert's decayed share of tokens: `[layers, experts]`."""
        return self.history.heat

    def has_all(self, layer: int) -> bool:
        """Whether every expert of `layer` is resident."""
        return not self._lacking[layer]

    def lookup(self, layer: int, experts: IntArray, worst: IntArray | None = None) -> IntArray:
        """Per expert its slot, LOADING or ABSENT: `[n]`.

        One that is there in a worse precision than `worst` [n] says counts as ABSENT.
        """
        slots = np.asarray(self.slot_of[layer, experts], dtype=np.int64)
        if worst is not None:
            slots[self.precision[layer, experts] > worst] = ABSENT
        return slots

    def read_bytes(self, layer: int, experts: IntArray) -> int:
        """Bytes that reading `experts`, one by one, moves."""
        return int(self.sizes.read_bytes[0, layer, experts].sum())

    def view(self, ahead: tuple[Ahead, ...] = (), route: Route | None = None) -> View:
        """The facts that policies may see now."""
        history = self.history
        return View(  # by place: it is made twice a layer, and names would cost half as much again
            self.step,
            self.layer,
            self.phase,
            len(self.rows),
            self.experts,
            self.top_k,
            self._slots.slots,
            self.ready,
            history.last_used,
            history.heat,
            ahead,
            route,
            self.precision,
            self.costs,
            history.kept_share,
            self.reads.busy,
        )

    # --- the step

    def begin_step(self, phase: Phase) -> None:
        """A forward pass starts."""
        self.step += 1
        self.phase, self.reads.reason, self._view = phase, phase, None
        self._standing.expected[:] = False

    def begin_layer(self, layer: int, route: Route | None = None) -> View:
        """A layer with experts starts; forecasts for it have served. Returns what is known."""
        self.layer = layer
        self._standing.expected[layer] = False
        if self.reads.loading or self.reads.draining:
            self.poll()
        self._view = self.view(route=route)
        return self._view

    def mark_used(self, layer: int, experts: IntArray) -> None:
        """Record that this step uses `experts`; for a layer that never has to evict, enough."""
        self.history.mark(layer, experts.tolist(), self.step)

    def touch(self, demand: Demand, tokens: int) -> None:
        """Record what a step of `tokens` tokens used."""
        experts = demand.experts.tolist()
        self.history.touch(demand, experts, tokens, self.step)
        if self.phase == "decode" and self._standing.passing:
            for expert in experts:
                if self.ready[demand.layer, expert]:
                    self._standing.stays((demand.layer, expert))

    def pin(self, layer: int, experts: Iterable[int]) -> Lease:
        """Pin `experts` (resident or to come) so that they stay until released."""
        return Lease(self._standing.pins, layer * self.experts, experts)

    def use(self, layer: int, experts: Sequence[int] | IntArray) -> IntArray:
        """The slots of READY experts that are now computed; counts their reads as useful."""
        row = self.rows[layer]
        ids = experts if isinstance(experts, list) else np.asarray(experts).tolist()
        if self._fresh:
            for key in [(layer, expert) for expert in ids if (layer, expert) in self._fresh]:
                self._fresh.remove(key)
                self.used_bytes_read += int(self.sizes.used_bytes[(self.precision[key], *key)])
        return np.array([row[expert] for expert in ids], dtype=np.int64)

    # --- reading

    def fetch(
        self,
        layer: int,
        experts: IntArray,
        keep: IntArray | None = None,
        precision: IntArray | None = None,
    ) -> IntArray:
        """Start demand reads in order, as far as there is room; returns those left over.

        Experts that are already on their way move to the front of the queue. `keep` holds the
        experts that may stay after a prefill; the others are transient. `precision` [n] is in
        which each is read, an index; None: the checkpoint's own.
        """
        if precision is not None:
            self._drop_worse(layer, experts, precision)
        row, ids = self.rows[layer], experts.tolist()
        kept = set() if keep is None else set(keep.tolist())
        self._make_room([row[expert] for expert in ids].count(ABSENT))
        for position, expert in enumerate(ids):
            state = row[expert]
            if state >= 0:
                continue
            transient = self._is_transient(expert in kept)
            if state == LOADING:
                self.reads.hurry(Expert(layer, expert), Urgency.DEMAND)
                if not transient:
                    self._standing.stays((layer, expert))
                continue
            if not self._slots.free:  # whoever may leave has left
                self._cancel(lambda key, read: key.layer != layer and read.urgency > 0)
                if not self._slots.free:
                    return experts[position:]
            kind = 0 if precision is None else int(precision[position])
            self._load(Expert(layer, expert), Urgency.DEMAND, transient, kind)
        return experts[:0]

    def let_go(self, experts: Iterable[Expert]) -> list[Expert]:
        """Evict those of `experts` that are READY and not pinned; returns them."""
        rows, pins, width = self.rows, self._standing.pins, self.experts
        found = [key for key in experts if rows[key[0]][key[1]] >= 0]
        idle = [key for key in found if key[0] * width + key[1] not in pins]
        for key in idle:
            self._evict(key)
        return idle

    def read(self, experts: Iterable[Expert]) -> list[Expert]:
        """Start demand reads in order, into free slots alone; returns those that are left over."""
        rows, left = self.rows, list[Expert]()
        with self.reads.link.together():
            for key in experts:
                if rows[key[0]][key[1]] == ABSENT and self._slots.free:
                    self._load(key, Urgency.DEMAND, transient=False)
                else:
                    left.append(key)
        return left

    def settle_in(self, layer: int, experts: IntArray) -> None:
        """Let experts that a prefill read ahead stay, as far as there is room for staying ones."""
        for expert in experts[self.ready[layer, experts]].tolist():
            if not self._is_transient(keep=True):
                self._standing.stays((layer, expert))

    def want(
        self,
        want: Want,
        limit: int,
        urgency: Urgency = Urgency.NEXT_LAYER,
        precision: IntArray | None = None,
    ) -> None:
        """Read ahead, if there is room: at most `limit` reads of wants are under way at once.

        `precision` [n] is in which each is read, an index; None: the checkpoint's own.
        """
        layer, row, ids = want.layer, self.rows[want.layer], want.experts.tolist()
        self._standing.expected[layer, want.experts] = True
        states = [row[expert] for expert in ids]
        absent, under_way = states.count(ABSENT), 0
        if absent:
            under_way = self.reads.ahead
            self._make_room(min(absent, limit - under_way), spare_expected=True)
        elif LOADING not in states:
            return
        for position, expert in enumerate(ids):
            if row[expert] == LOADING:
                self.reads.hurry(Expert(layer, expert), urgency)
            elif row[expert] == ABSENT:
                if under_way >= limit:
                    return
                if not self._slots.free and not self.room(1, spare_expected=True):
                    return
                kind = 0 if precision is None else int(precision[position])
                self._load(Expert(layer, expert), urgency, self._is_transient(keep=False), kind)
                under_way += 1

    def drop_wants(self, layer: int, needed: IntArray) -> None:
        """Cancel reads for `layer` that turn out not to be needed."""
        if self.reads.loading:
            keep = set(needed.tolist())
            self._cancel(lambda key, _: key.layer == layer and key.index not in keep)

    def poll(self) -> None:
        """Take over what the link finished."""
        if self.reads.loading:
            for key, slot, done in self.reads.settled():
                self._settle(key, slot, done)
        if self.reads.draining:
            for slot in self.reads.drained():
                self._slots.give(slot)

    def wait(self, timeout_s: float) -> float:
        """Wait until some read settles, or the timeout. Returns the seconds that passed."""
        passed_s = self.reads.wait(timeout_s)
        self.poll()
        return passed_s

    def room(self, count: int, *, spare_expected: bool = False) -> bool:
        """Make `count` slots free, of expected experts last if at all; or change nothing: False."""
        lacking = count - self._slots.free
        allowed = self._allowed(lacking)
        if lacking > 0 and len(self._victims(lacking, allowed, spare_expected)) < lacking:
            return False
        self._make_room(count, spare_expected=spare_expected)
        return True

    def vacate(self, count: int) -> None:
        """Make `count` slots free, whoever leaves for it. Between steps."""
        lacking = count - self._slots.free
        self._evict_all(self._victims(lacking, lacking, spare_expected=False))

    def cancel_all(self) -> None:
        """Cancel every read; after a failed or cancelled step."""
        self._cancel(lambda *_: True)
        self.reads.forget_failures()

    def check(self) -> None:
        """Assert that the books balance. Only between steps, when nothing is pinned."""
        self.poll()
        under_way = len(self.reads.loading) + len(self.reads.draining)
        held = self.resident + under_way + self.spare
        assert held == self.slots, "a slot is lost or held twice"
        assert not self._standing.pins, "an expert is still pinned"
        assert (self.slot_of == np.array(self.rows)).all(), "two books about the slots"
        assert (self.ready == (self.slot_of >= 0)).all(), "slot_of and ready differ"
        slots = self.slot_of[self.ready]
        assert len(np.unique(slots)) == len(slots) == self.resident, "one slot for two experts"
        assert np.count_nonzero(self.slot_of == LOADING) == len(self.reads.loading)
        assert np.count_nonzero(self._standing.transient) == self._standing.passing

    # --- changes of state

    def _make_room(self, count: int, *, spare_expected: bool = False) -> None:
        """Free slots until `count` are free, or nobody else may leave."""
        if count <= 0:
            return
        # Who passes makes room for one who passes: only others make the ring larger.
        allowed = self._allowed(count)
        if self.phase == "prefill":  # those that only passed leave early: new pages may be slow
            self._evict_all(self._standing.passers(count - self._slots.quick, self._now()))
        if (lacking := count - self._slots.free) > 0:
            self._evict_all(self._victims(lacking, allowed, spare_expected))

    def _allowed(self, count: int) -> int:
        """How many of `count` victims may be such that do not just pass."""
        ring = self.division.ring - self._standing.passing
        return count if self.phase == "decode" else max(0, ring)

    def _victims(self, count: int, allowed: int, spare_expected: bool) -> IntArray:
        """Up to `count` experts to evict: layer * experts + expert."""
        return self._standing.victims(count, allowed, self._now(), spare_expected=spare_expected)

    def _evict_all(self, ids: IntArray) -> None:
        for at in ids.tolist():
            self._evict(divmod(at, self.experts))

    def _now(self) -> View:
        if self._view is None:
            self._view = self.view()
        return self._view

    def _is_transient(self, keep: bool) -> bool:
        if self.phase == "decode" or self.division.whole:
            return False
        held = self.slots - self._slots.free - self._standing.passing
        return not (keep and held < self.slots - self.division.ring)

    def _drop_worse(self, layer: int, experts: IntArray, precision: IntArray) -> None:
        """Let go of what is there, or on its way, in a worse precision than it is read in."""
        worse = set(experts[self.precision[layer, experts] > precision].tolist())
        self._cancel(lambda key, _: key.layer == layer and key.index in worse)
        for expert in worse:
            if self.ready[layer, expert]:
                self._evict((layer, expert))

    def _load(self, key: Expert, urgency: Urgency, transient: bool, precision: int = 0) -> None:
        slot = self._slots.take()
        assert slot is not None
        self.reads.start(key, slot, urgency, precision)
        self._set(key, LOADING)
        self.precision[key] = precision
        if transient:
            self._standing.passes(key)

    def _settle(self, key: Expert, slot: int, done: bool) -> None:
        if done:
            self._set(key, slot)
            size = self._read_bytes[int(self.precision[key])][key[0]][key[1]]
            if not self.reads.count(key, size):
                self._fresh.add(key)  # but what came with a new set: no step has asked for that
            self.ready[key] = True
            self._lacking[key.layer] -= 1
            self.resident += 1
            return
        self._set(key, ABSENT)
        self._standing.stays(key)
        self._slots.give(slot)

    def _cancel(self, chosen: Callable[[Expert, Ticket], bool]) -> None:
        for key, slot in self.reads.cancel(chosen):
            self._set(key, ABSENT)
            self._standing.stays(key)
            if slot is not None:
                self._slots.give(slot)

    def _evict(self, key: tuple[int, int]) -> None:
        self._slots.give(self.rows[key[0]][key[1]])
        self._set(key, ABSENT)
        self.ready[key] = False
        self._fresh.discard(key)
        self._standing.stays(key)
        self._lacking[key[0]] += 1
        self.resident -= 1

    def _set(self, key: tuple[int, int], state: int) -> None:
        self.slot_of[key] = state
        self.rows[key[0]][key[1]] = state
