"""Replays a recording through a preset's policies, on a simulated clock.

The same `Attendance` and `ExpertCache` decide as in the engine; what is simulated is the link, the
slots and the time that computing takes. Whoever looks at tokens is shown those of the recording.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from retinue.memory.attendance import Attendance, Turn
from retinue.memory.base import Sizes
from retinue.memory.cache import ExpertCache
from retinue.metrics import Metrics, PhaseCounters
from retinue.policy.base import Prompt, Route
from retinue.policy.order.cohort import Cohort
from retinue.policy.policies import Policies
from retinue.sim.costs import Times
from retinue.sim.link import Numbers, Roads, SimulatedLink
from retinue.sim.passes import Load, Pass, Passes
from retinue.sim.recorded import Part, Recording
from retinue.types import Demand, FloatArray


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a recording is replayed: room for `slots` experts, roads, times, requests."""

    slots: int
    roads: Roads
    times: Times
    load: Load = Load()


@dataclass(slots=True)
class Outcome:
    """What a replay cost. `first_token_s` are from each request's arrival, in its order."""

    metrics: Metrics = field(default_factory=Metrics)
    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)

    @property
    def decode(self) -> PhaseCounters:
        """The decode passes."""
        return self.metrics.total.decode

    @property
    def prefill(self) -> PhaseCounters:
        """The passes over prompts."""
        return self.metrics.total.prefill


class Replay:
    """One replay: `run` it once. `sizes` are those of the model's experts."""

    def __init__(
        self, recording: Recording, policies: Policies, setting: Setting, sizes: Sizes
    ) -> None:
        head = recording.head
        self._recording, self._policies, self._times = recording, policies, setting.times
        self._link = SimulatedLink(setting.roads, sizes)
        slots = Numbers(setting.slots)
        self._cache = ExpertCache(sizes, slots, self._link, policies.evictor, head.top_k)
        size = int(sizes.read_bytes[0].max())
        self._cache.costs = setting.times.shown(setting.roads, size)
        self._outcome = Outcome()
        self._attendance = Attendance(
            self._cache, policies, head.routed, self._outcome.metrics
        )
        cohort = Cohort(
            layers=len(head.routed), experts=head.experts, top_k=head.top_k, slots=setting.slots
        )
        self._load = setting.load
        self._passes = Passes(recording.requests, setting.load, cohort)
        self._sees = bool(policies.watchers or policies.needs)

    def run(self) -> Outcome:
        """Replay it all."""
        link, passes = self._link, self._passes
        while (now := passes.next(link.now, link.advance_to)) is not None:
            for request in now.begun:
                self._attendance.begin(self._prompt(request))
            self._pass(now)
            for request in passes.ran(now):
                self._attendance.end(request)
            self._note(now)
        self._cache.cancel_all()
        self._cache.check()
        self._outcome.seconds = link.now
        return self._outcome

    def _pass(self, now: Pass) -> None:
        """One pass through all layers."""
        link, cache, metrics = self._link, self._cache, self._outcome.metrics
        started, read, used = link.now, link.bytes_read, cache.used_bytes_read
        counters = metrics.begin(now.phase)
        self._attendance.begin_pass(now.phase)
        tokens = sum(part.stop - part.start for part in now.parts)
        link.advance(self._times.pass_s)
        layer_s = self._times.layer(tokens)
        for place, demand in enumerate(self._recording.demands(now.parts)):
            link.advance(layer_s)
            self._layer(place, demand, now.parts, tokens)
        counters.passes, counters.tokens = 1, tokens
        counters.seconds = link.now - started
        counters.dense_s = self._times.pass_s + layer_s * len(self._recording.head.routed)
        counters.bytes_read = link.bytes_read - read
        counters.used_bytes_read = cache.used_bytes_read - used
        metrics.finish()
        if now.phase == "decode" and self._passes.cohort is not None:
            self._passes.cohort.observe(counters, len(now.parts), now.ready)

    def _layer(self, place: int, demand: Demand, parts: Sequence[Part], tokens: int) -> None:
        cache, attendance = self._cache, self._attendance
        route = self._route(place, parts) if self._sees else None
        if cache.holds_everything and cache.has_all(demand.layer):
            attendance.see(demand, route)
            cache.use(demand.layer, demand.experts)
            self._compute(demand, demand.experts.tolist(), tokens)
            return

        def scores_of(layer: int) -> FloatArray | None:
            """The recorded word of the next layer's router alone."""
            if attendance.following.get(demand.layer) != layer:
                return None
            return self._recording.signal("next_scores", parts, place)

        with attendance.attend(demand, tokens, route, scores_of) as turn:
            self._turn(turn, demand, tokens)

    def _turn(self, turn: Turn, demand: Demand, tokens: int) -> None:
        while turn.left:
            ready = turn.ready()
            if ready:
                self._cache.use(demand.layer, ready)
                self._compute(demand, ready, tokens)
                turn.computed(ready)
            else:
                turn.wait()

    def _compute(self, demand: Demand, experts: Sequence[int], tokens: int) -> None:
        """Let the time pass that `experts` take."""
        seconds = len(experts) * self._times.expert_s
        if tokens > 1:
            at = np.searchsorted(demand.experts, experts)
            seconds += int((demand.tokens[at] - 1).sum()) * self._times.expert_token_s
        self._outcome.metrics.now.expert_s += seconds
        self._link.advance(seconds)

    def _route(self, place: int, parts: Sequence[Part]) -> Route:
        """What the routers chose for the tokens of the pass in one layer."""
        recording, needs = self._recording, self._policies.needs
        experts, weights = recording.rows(parts)
        counts = [part.stop - part.start for part in parts]
        return Route(
            recording.head.routed[place],
            experts[:, place],
            weights[:, place],
            np.repeat([part.request for part in parts], counts),
            recording.signal("scores", parts, place) if "scores" in needs else None,
            recording.signal("hidden", parts, place) if "hidden" in needs else None,
            recording.token_ids(parts) if "token_ids" in needs else None,
        )

    def _prompt(self, number: int) -> Prompt:
        request = self._recording.requests[number]
        ids = request.token_ids[: request.prompt_tokens]
        return Prompt(number, request.task, ids, request.signals.get("embedding"))

    def _note(self, done: Pass) -> None:
        """Note when requests have had their first token: with the last one of their prompt."""
        for part in done.parts:
            if part.stop == self._recording.requests[part.request].prompt_tokens:
                arrivals = self._load.arrivals
                came = arrivals[part.request] if arrivals else 0.0
                self._outcome.first_token_s.append(self._link.now - came)
