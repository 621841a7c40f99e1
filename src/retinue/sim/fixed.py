"""Layers whose residents serve every token: a placement chooses them, books say who is fetched.

As `engine/residents.py` and `memory/exchange.py` do it, without slots: a set changes before a pass,
which waits for what the new one lacks; what a book fetches in a pass is read while the others are
computed. Approximate: see `sim/changed.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retinue.memory.attendance import demand_of
from retinue.memory.base import Ticket, Urgency
from retinue.policy.base import Forecaster, Running, Stock
from retinue.policy.miss.book import Books
from retinue.policy.place.occasions import occasions_of
from retinue.policy.place.tables import Tables
from retinue.policy.policies import Policies
from retinue.policy.profile import Profile
from retinue.sim.changed import Rows, choice_of, reroute
from retinue.sim.recorded import Part
from retinue.sim.stage import Stage
from retinue.types import Demand, Expert, FloatArray, IntArray, Phase

WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Beforehand:
    """What a placement goes by: what was learnt of the model, and who forecasts."""

    profile: Profile | None = None
    forecaster: Forecaster | None = None


class Fixed:
    """All layers under one preset with a placement."""

    def __init__(self, stage: Stage, policies: Policies, known: Beforehand) -> None:
        self._stage, self._policies = stage, policies
        self._placement, self._there = policies.placement, stage.sizes.there
        shape = (self._there.shape[0], self._there.shape[1])
        self._tables = Tables(shape, known.profile, known.forecaster)
        period = known.profile.period if known.profile else None
        self._occasions = occasions_of(policies, self._tables, period)
        self._books = Books(policies.fetch_above, shape)
        self._running: dict[int, Running] = {}
        self._used: dict[int, FloatArray] = {}  # by the prompts that are being read
        self._coming: list[tuple[int, Ticket]] = []  # what a new set lacks, by layer
        self._phase: Phase = "prefill"

    def begin(self, request: int) -> None:
        """A request has its first pass next."""
        found = self._stage.recording.requests[request]
        self._running[request] = Running(
            found.task, found.prompt_tokens, found.answer_tokens, new=True
        )
        self._used[request] = np.zeros(self._there.shape, dtype=np.float32)

    def end(self, request: int) -> None:
        """A request has ended."""
        del self._running[request]
        self._used.pop(request, None)

    def begin_pass(self, phase: Phase) -> None:
        """A pass starts: the set for those that run is placed, if it is another one."""
        self._phase = phase
        running = list(self._running.values())
        if (occasion := self._occasions.begin(running)) is not None:
            if occasion.places:
                self._change(running)
            else:
                self._books.expect(self._occasions.popularity(running))
            self._occasions.placed = occasion.key
        self._running = {number: replace(each, new=False) for number, each in self._running.items()}

    def end_pass(self) -> None:
        """A pass has ended: what the prompts that are done used is learnt."""
        self._books.commit()
        self._coming.clear()

    def finish(self) -> None:
        """The replay is over."""
        self._books.commit()

    def layer(self, place: int, demand: Demand, parts: Sequence[Part], tokens: int) -> None:
        """Run one layer of the pass; `demand` is what its router alone would ask for."""
        stage, recording = self._stage, self._stage.recording
        layer = demand.layer
        rows = Rows(*recording.rows(parts, place))
        scores = recording.signal("scores", parts, place)
        assert scores is not None
        asks = "hidden" in self._policies.routing.needs
        hidden = recording.signal("hidden", parts, place) if asks else None
        choice = choice_of(layer, rows, scores, self._phase, hidden)
        hits = int(np.count_nonzero(self._books.there()[layer, demand.experts]))
        stage.metrics.count(layer, hits, misses=len(demand.experts) - hits)
        book = self._books.serve(choice)
        served = reroute(self._policies.routing, choice, book.may)
        given = rows.weights.sum()
        stage.metrics.count_weight(layer, float(given), float(served.degraded.sum()))
        counters = stage.metrics.now
        counters.rerouted += served.rerouted
        counters.missed += int(book.missed.sum())
        counters.fetched += len(book.fetched)
        self._learn(layer, rows, parts)
        self._await(layer)
        # Nothing waits here, but runs count such layers, and their times are divided by that.
        late_s = stage.times.late_s if hits < len(demand.experts) else 0.0
        serving = demand_of(layer, *served.rows, recording.head.experts)
        self._compute(serving, book.fetched, tokens, late_s)

    def _await(self, layer: int) -> None:
        """Wait for what a new set brings to `layer`."""
        while tickets := [t for at, t in self._coming if at == layer and not t.settled]:
            self._stage.metrics.now.stall_s += self._stage.link.wait(tickets, WAIT_S)

    def _compute(self, demand: Demand, fetched: IntArray, tokens: int, late_s: float) -> None:
        """Compute what is there, then what is read, as it comes."""
        stage, layer = self._stage, demand.layer
        coming = {expert: self._read(layer, expert) for expert in np.unique(fetched).tolist()}
        there = [expert for expert in demand.experts.tolist() if expert not in coming]
        stage.compute(demand, there, tokens, late_s)
        needed = set(demand.experts.tolist())
        while coming:
            done = [expert for expert, ticket in coming.items() if ticket.settled]
            for expert in done:
                del coming[expert]
            stage.compute(demand, [expert for expert in done if expert in needed], tokens)
            if coming and not done:
                stage.metrics.now.stall_s += stage.link.wait(list(coming.values()), WAIT_S)

    def _read(self, layer: int, expert: int) -> Ticket:
        return self._stage.link.submit(Expert(layer, expert), 0, Urgency.DEMAND, 0)

    def _learn(self, layer: int, rows: Rows, parts: Sequence[Part]) -> None:
        """Sum up what prompts use, and tell the forecaster of those whose last layer this is."""
        if self._phase != "prefill":
            return
        recording, start = self._stage.recording, 0
        for part in parts:
            stop = start + part.stop - part.start
            used = self._used[part.request]
            ids, given = rows.experts[start:stop].ravel(), rows.weights[start:stop].ravel()
            valid = ids < used.shape[1]
            np.add.at(used[layer], ids[valid], given[valid])
            start = stop
            request = recording.requests[part.request]
            if part.stop == request.prompt_tokens and layer == recording.head.routed[-1]:
                self._occasions.observe(request.task, used, self._books.there())

    def _change(self, running: Sequence[Running]) -> None:
        """Place another set, and start to read it."""
        head, before = self._stage.recording.head, self._books.there()
        stock = Stock(self._stage.setting.slots, head.top_k, self._there, before)
        wanted = self._placement.place(stock, running, self._tables)
        self._coming = [
            (layer, self._read(layer, expert))
            for layer, expert in np.argwhere(wanted & ~before).tolist()
        ]
        self._books.place(wanted, self._occasions.popularity(running))
