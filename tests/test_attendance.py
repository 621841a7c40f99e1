"""A layer's turn over numbers alone: what is asked, counted, read and waited for."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from disk import ids
from retinue.errors import Cancelled
from retinue.memory import payback
from retinue.memory.attendance import Attendance, Turn, asked, demand_of
from retinue.memory.base import Sizes, TicketState, Urgency
from retinue.memory.cache import ExpertCache
from retinue.memory.instant import DoneTicket, InstantLink, NumberedSlots
from retinue.metrics import Metrics
from retinue.policy.base import BoolArray, Costs, Prompt, Route, View
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import NoPredictor, Policies
from retinue.policy.predict.stacked_gates import StackedGates
from retinue.types import Demand, Expert, FloatArray, IntArray, Phase, Want

LAYERS, EXPERTS = 3, 6


def test_neither_cache_nor_attendance_needs_torch() -> None:
    code = (
        "import json, sys; import retinue.memory.attendance, retinue.memory.cache;"
        " import retinue.memory.instant; print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert not {"torch", "transformers"} & set(json.loads(done.stdout))


class SlowTicket(DoneTicket):
    """A read that is done when its link says so."""

    def __init__(self, urgency: Urgency) -> None:
        super().__init__(urgency, TicketState.QUEUED)

    @property
    def settled(self) -> bool:
        return self.state is not TicketState.QUEUED


class SlowLink(InstantLink):
    """One read ends each time that somebody waits, the most urgent first, and takes a second."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.queue: list[SlowTicket] = []
        self.precisions: list[int] = []
        self.now = self.read_s = 0.0

    def submit(self, expert: Expert, slot: int, urgency: Urgency, precision: int) -> SlowTicket:
        super().submit(expert, slot, urgency, precision)
        self.precisions.append(precision)
        self.queue.append(SlowTicket(urgency))
        return self.queue[-1]

    def raise_urgency(self, ticket: Any, urgency: Urgency) -> None:
        ticket.urgency = min(urgency, ticket.urgency)

    def cancel(self, ticket: Any) -> None:
        ticket.state = TicketState.CANCELLED
        self.queue.remove(ticket)

    def wait(self, tickets: Any, timeout_s: float) -> float:
        first = min(self.queue, key=lambda ticket: ticket.urgency)
        first.state = TicketState.DONE
        self.queue.remove(first)
        self.now += 1.0
        self.read_s += 1.0
        return 1.0

    def clock(self) -> float:
        return self.now

    def busy(self) -> float:
        return self.read_s


class Noting:
    """A watcher, predictor, miss handler and precision in one: it notes who is asked what."""

    needs: frozenset[str] = frozenset()
    depth, speculative, exact = 1, True, True
    names = ("as-is", "int4")
    renormalises = False

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.wants: list[Want] = []
        self.worst = 1

    def begin(self, prompt: Prompt) -> None:
        self.asked.append(("begin", prompt.sequence))

    def end(self, sequence: int) -> None:
        self.asked.append(("end", sequence))

    def observe(self, demand: Demand, view: View) -> None:
        self.asked.append(("observe", view.layer, None if view.route is None else "route"))

    def forecast(self, view: View) -> list[Want]:
        self.asked.append(("forecast", view.ahead[0].layer))
        return self.wants

    def fetch(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        self.asked.append(("fetch", demand.experts[~resident].tolist()))
        return demand.experts[~resident]

    def elsewhere(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        return demand.experts[~resident][:1]

    def pick(self, demand: Demand, view: View) -> IntArray:
        return np.full(len(demand.experts), self.worst)

    def pick_ahead(self, want: Want, view: View) -> IntArray:
        return np.full(len(want.experts), 1)


def sizes() -> Sizes:
    read = np.full((2, LAYERS, EXPERTS), 8)
    read[1] = 2
    return Sizes(read, read // 2)


class Rig:
    """An attendance over `slots` numbered slots, top-2."""

    def __init__(
        self,
        slots: int,
        policies: Policies | None = None,
        link: Callable[[Sizes], InstantLink] = InstantLink,
    ) -> None:
        self.link: Any = link(sizes())
        policies = policies or Policies(Recency(), NoPredictor(), FetchAll())
        self.cache = ExpertCache(
            sizes(), NumberedSlots(slots), self.link, policies.evictor, top_k=2
        )
        self.metrics = Metrics()
        self.counters = self.metrics.begin("decode")
        self.attendance = Attendance(self.cache, policies, range(LAYERS), self.metrics)
        self.attendance.begin_pass("decode")

    def turn(self, layer: int, *experts: int, **more: Any) -> Turn:
        demand = demand_of(layer, ids(*experts), np.ones(len(experts), np.float32), EXPERTS)
        return self.attendance.attend(demand, 1, **more)

    def run(self, layer: int, *experts: int, **more: Any) -> list[list[int]]:
        """One layer; what was computed together."""
        done = []
        with self.turn(layer, *experts, **more) as turn:
            while turn.left:
                if ready := turn.ready():
                    done.append(ready)
                    self.cache.use(layer, ready)
                    turn.computed(ready)
                else:
                    turn.wait()
        self.cache.check()
        return done


def test_demand_names_each_expert_once() -> None:
    chosen = np.array([[4, 1], [1, EXPERTS], [1, 0]])
    weights = np.array([[0.5, 0.25], [1.0, 9.0], [0.5, 0.5]], dtype=np.float32)
    demand = demand_of(2, chosen, weights, EXPERTS)
    assert demand.layer == 2
    assert demand.experts.tolist() == [0, 1, 4]
    assert demand.tokens.tolist() == [1, 3, 1]
    assert demand.weight.tolist() == [0.5, 1.75, 0.5]


def test_hits_misses_and_those_on_their_way_are_counted() -> None:
    noting = Noting()
    noting.wants = [Want(1, ids(5, 3), np.ones(2, np.float32))]
    rig = Rig(8, Policies(Recency(), noting, FetchAll()), SlowLink)
    assert rig.run(0, 2, 4) == [[2], [4]]
    assert rig.cache.slot_of[1].tolist() == [-1, -1, -1, -2, -1, -2]
    noting.wants = []
    assert rig.run(1, 5, 0) == [[5], [0]]
    assert rig.cache.slot_of[1, 3] == -1, "what is on its way and not needed is dropped"
    rig.attendance.begin_pass("decode")
    rig.run(0, 2, 4)
    counters = rig.counters
    assert (counters.hits, counters.pending, counters.misses) == (2, 1, 3)
    assert counters.repeated == 2
    assert counters.stall_s == 4.0
    assert rig.attendance.last_missed[1].tolist() == [1, -1, -1, -1, -1, 1]


def test_who_is_asked_and_in_which_order() -> None:
    watcher, predictor = Noting(), Noting()
    predictor.asked = watcher.asked  # one list, to see the order
    policies = Policies(Recency(), predictor, predictor, watchers=(watcher,))
    rig = Rig(8, policies)
    rig.attendance.begin(Prompt(7, None, ids()))
    route = Route(0, ids(1, 2)[None], np.ones((1, 2), np.float32), ids(7))
    rig.run(0, 1, 2, route=route)
    rig.run(2, 1, 2)
    rig.attendance.end(7)
    assert watcher.asked == [
        ("begin", 7),
        ("observe", 0, "route"),
        ("observe", 0, "route"),
        ("fetch", [1, 2]),
        ("forecast", 1),
        ("observe", 2, None),
        ("observe", 2, None),
        ("fetch", [1, 2]),  # nothing comes after the last layer
        ("end", 7),
    ]


def test_only_what_is_needed_is_asked_of_coming_routers() -> None:
    asked = []

    def scores_of(layer: int) -> FloatArray | None:
        asked.append(layer)
        return np.eye(EXPERTS, dtype=np.float32)[:1] + 0.1

    plain = Rig(9, Policies(Recency(), NoPredictor(), FetchAll()))
    plain.run(0, 1, scores_of=scores_of)
    assert asked == []
    rig = Rig(9, Policies(Recency(), StackedGates(), FetchAll()))
    rig.run(0, 1, scores_of=scores_of)
    assert asked == [1]
    assert rig.link.reads == 3  # its own, and the two most likely of the next
    rig.attendance.begin_pass("decode")
    for expert in range(EXPERTS):
        rig.run(1, expert)
    asked.clear()
    rig.run(0, 1, scores_of=scores_of)
    assert asked == [], "nothing is missing there"


def test_more_experts_than_slots_run_in_waves() -> None:
    rig = Rig(2)
    waves = rig.run(0, 0, 1, 2, 3, 4)
    assert sorted(expert for wave in waves for expert in wave) == [0, 1, 2, 3, 4]
    assert all(len(wave) == 1 for wave in waves[:3]), "each one makes room for the next"
    assert rig.link.reads == 5


def test_a_wait_asks_whether_anybody_still_wants_it() -> None:
    rig = Rig(4, link=SlowLink)
    rig.attendance.stop = lambda: True
    with pytest.raises(Cancelled):
        rig.run(0, 1)
    assert not rig.cache._standing.pins


def test_what_has_a_place_elsewhere_is_neither_read_nor_awaited() -> None:
    rig = Rig(8, Policies(Recency(), NoPredictor(), Noting()))
    rig.cache.costs = Costs(1.0, 1.0, 1.0, elsewhere_s=0.5)
    with rig.turn(0, 1, 2) as turn:
        assert turn.elsewhere.tolist() == [1]
        assert turn.left == {2}
        turn.wait()
        turn.computed(turn.ready())
    assert rig.link.reads == 1
    assert rig.counters.misses == 2


def test_a_worse_precision_serves_until_a_better_one_is_asked_for() -> None:
    noting = Noting()
    noting.exact = False
    policies = Policies(Recency(), NoPredictor(), FetchAll(), precision=noting)
    rig = Rig(8, policies, SlowLink)
    rig.run(0, 1, 2)
    assert rig.cache.precision[0, :3].tolist() == [0, 1, 1]
    rig.run(0, 1, 2)
    assert (rig.link.reads, rig.link.bytes_read) == (2, 4)
    noting.worst = 0
    rig.run(0, 1)
    assert rig.cache.precision[0, :3].tolist() == [0, 0, 1]
    assert (rig.link.reads, rig.link.bytes_read) == (3, 12)
    assert rig.counters.misses == 3
    noting.worst = 1
    rig.run(0, 1)
    assert rig.link.precisions == [1, 1, 0], "a better one always does"
    assert rig.cache.used_bytes_read == 1 + 1 + 4


def test_reads_ahead_have_a_precision_too() -> None:
    noting = Noting()
    noting.exact, noting.worst = False, 0
    noting.wants = [Want(1, ids(3), np.ones(1, np.float32))]
    rig = Rig(8, Policies(Recency(), noting, FetchAll(), precision=noting), SlowLink)
    rig.run(0, 1)
    assert rig.link.precisions == [0, 1]
    rig.run(1, 3)
    assert rig.link.precisions == [0, 1, 0], "what is on its way in a worse one is read anew"


def test_the_plain_model_never_runs_in_a_lower_precision() -> None:
    noting = Noting()
    noting.exact = False
    noting.wants = [Want(1, ids(3), np.ones(1, np.float32))]
    rig = Rig(8, Policies(Recency(), noting, FetchAll(), precision=noting))
    rig.run(0, 1)
    rig.attendance.lowers = False
    rig.attendance.begin_pass("decode")
    rig.run(0, 1)
    rig.run(1, 3)
    assert rig.cache.precision[:2].sum() == 0
    assert rig.counters.misses == 3


def test_no_forecast_is_asked_for_while_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    noting = Noting()
    rig = Rig(9, Policies(Recency(), noting, FetchAll(), gated=True), SlowLink)
    gate: Any = rig.attendance._payback
    took: list[float] = []
    monkeypatch.setattr(gate, "begin", lambda waits: None)
    monkeypatch.setattr(gate, "end", took.append)
    for ahead in (True, False):
        gate.ahead = ahead
        noting.asked.clear()
        rig.attendance.begin_pass("decode")
        for layer in range(LAYERS):
            rig.run(layer, 3 * ahead, 1 + 3 * ahead)
        assert (("forecast", 1) in noting.asked) is ahead
    assert took == [6.0, 6.0], "two reads of a second in each of three layers"
    noting.asked.clear()
    rig.attendance.begin_pass("prefill")
    rig.run(0, 5)
    assert ("forecast", 1) in noting.asked, "the first wait of prompts, as nobody knows better"


def test_a_layer_of_a_prompt_looks_ahead_once_it_has_waited_for_that_long() -> None:
    noting = Noting()
    rig = Rig(16, Policies(Recency(), noting, FetchAll(), gated=True), SlowLink)
    patience: Any = rig.attendance._patience

    def asked_in(layer: int, *experts: int) -> bool:
        noting.asked.clear()
        rig.run(layer, *experts)
        return ("forecast", layer + 1) in noting.asked

    assert asked_in(1, 0), "a decoding token does not wait for that"
    rig.attendance.begin_pass("prefill")
    patience.takes_s = 1.5
    assert asked_in(0), "nothing lacking, and nobody waited too shortly yet"
    assert not asked_in(0, 1), "a read of one second, for which it waited"
    assert not asked_in(0, 1), "nothing lacking, and such waits are not worth it"
    rig.attendance.looked = lambda: rig.link.wait([], 0) if rig.link.queue else None
    assert asked_in(0, 2, 3, 4), "two of three seconds were more"
    assert patience.takes_s == 1.5 + payback.LATELY * (1.0 - 1.5), "the look took one"
    assert asked_in(0, 1), "nothing lacking, and the last one that lacked had to wait"
    rig.attendance.begin_pass("decode")
    assert rig.attendance.patience is None


def test_half_of_who_is_there_makes_room_for_the_rest() -> None:
    assert Rig(4).run(0, *range(6)) == [[0, 1], [2, 3], [4, 5]]
    assert Rig(1).run(0, *range(3)) == [[0], [1], [2]]


def test_presets_that_are_not_gated_look_ahead_before_they_compute() -> None:
    noting = Noting()
    rig = Rig(16, Policies(Recency(), noting, FetchAll()), SlowLink)
    rig.attendance.begin_pass("prefill")
    with rig.turn(0, 1) as turn:
        assert ("forecast", 1) in noting.asked
        turn.wait()
        turn.computed(turn.ready())


def test_how_busy_the_link_is_while_tokens_are_decoded() -> None:
    rig = Rig(9, link=SlowLink)

    def run(computing_s: float, phase: Phase = "decode") -> float:
        rig.attendance.begin_pass(phase)
        rig.link.now += computing_s
        for layer in range(LAYERS):
            rig.run(layer, 0, 1)
        return rig.cache.view().busy

    assert run(0.0) == 1.0, "six reads of a second each, and nothing else"
    assert run(1.0) == pytest.approx(0.9), "nothing is read"
    assert run(1.0, "prefill") == pytest.approx(0.9)
    for _ in range(99):
        run(1.0)
    assert run(1.0) < 0.01


@pytest.mark.parametrize(("tokens", "stride"), [(1, 1), (64, 1), (65, 2), (230, 4), (2048, 32)])
def test_long_prompts_are_foreseen_by_some_of_their_tokens(tokens: int, stride: int) -> None:
    chosen = list(range(tokens))[asked(tokens)]
    assert len(chosen) <= 64
    assert chosen[:2] == [0, stride][: len(chosen)]
