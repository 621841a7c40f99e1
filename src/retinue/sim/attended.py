"""Layers that read what they lack: what the engine's `Attendance` does, on a simulated clock.

Approximate policies may let others serve, leave experts out, or read them in a worse precision;
what the chosen expert did not serve as it is counts as degraded.
"""

from collections.abc import Callable, Sequence

import numpy as np

from retinue.memory.attendance import Attendance, Turn, asked, demand_of
from retinue.memory.cache import ExpertCache
from retinue.memory.instant import NumberedSlots
from retinue.policy.base import Route
from retinue.policy.policies import Policies
from retinue.sim.changed import Rows, choice_of, reroute, thin
from retinue.sim.recorded import Part
from retinue.sim.stage import Stage
from retinue.trace import AHEAD
from retinue.types import Demand, FloatArray, Phase


class Attended:
    """All layers under one preset."""

    def __init__(self, stage: Stage, policies: Policies) -> None:
        self._stage, self._policies = stage, policies
        head, slots = stage.recording.head, stage.setting.slots
        self.cache = ExpertCache(
            stage.sizes, NumberedSlots(slots), stage.link, policies.evictor, head.top_k
        )
        self.cache.costs = stage.costs
        if policies.ring is not None:
            self.cache.division.give(round(policies.ring * slots))
        self._attendance = Attendance(self.cache, policies, head.routed, stage.metrics)
        self._attendance.looked = lambda: stage.link.advance(stage.times.ahead_s)
        self._shows = policies.sees_tokens
        self._changes = not (policies.routing.exact and policies.thinning.exact)
        self._phase: Phase = "prefill"

    def begin(self, request: int) -> None:
        """A request has its first pass next."""
        self._attendance.begin(self._stage.prompt(request))

    def end(self, request: int) -> None:
        """A request has ended."""
        self._attendance.end(request)

    def begin_pass(self, phase: Phase) -> None:
        """A pass starts."""
        self._phase = phase
        self._attendance.begin_pass(phase)

    def end_pass(self) -> None:
        """A pass has ended."""

    def finish(self) -> None:
        """The replay is over: the books balance."""
        self.cache.cancel_all()
        while self.cache.reads.draining:
            self.cache.wait(1.0)
        self.cache.check()

    def layer(self, place: int, demand: Demand, parts: Sequence[Part], tokens: int) -> None:
        """Run one layer of the pass."""
        stage, cache, attendance = self._stage, self.cache, self._attendance
        route = stage.route(place, parts, self._policies.needs) if self._shows else None
        if self._changes:
            demand = self._changed(place, parts, route)
        if cache.holds_everything and cache.has_all(demand.layer):
            attendance.see(demand, route)
            stage.compute(demand, demand.experts.tolist(), tokens)
            return
        scores_of = self._scores_of(place, parts)
        counters = stage.metrics.now
        lacking = counters.lacking
        with attendance.attend(demand, tokens, route, scores_of) as turn:
            late_s = (counters.lacking - lacking) * stage.times.late_s
            self._turn(turn, demand, tokens, late_s)

    def _turn(self, turn: Turn, demand: Demand, tokens: int, late_s: float) -> None:
        """`late_s` passes with the first experts, while others are read."""
        stage, exact = self._stage, self._policies.precision.exact
        apart = stage.start_elsewhere(demand, turn.elsewhere)
        while turn.left:
            ready = turn.ready()
            if not ready:
                turn.wait()
                continue
            if not exact:
                self._count_worse(demand, ready)
            stage.compute(demand, ready, tokens, late_s)
            late_s = 0.0
            turn.computed(ready)
        stage.link.advance_to(apart)

    def _scores_of(self, place: int, parts: Sequence[Part]) -> Callable[[int], FloatArray | None]:
        """What is recorded of this layer's router, or of a coming one's."""
        recording = self._stage.recording
        signals = dict(zip(recording.head.routed[place:], ("scores", *AHEAD), strict=False))

        def scores(layer: int) -> FloatArray | None:
            said = recording.signal(signals[layer], parts, place) if layer in signals else None
            return None if said is None else said[asked(len(said))]

        return scores

    def _changed(self, place: int, parts: Sequence[Part], route: Route | None) -> Demand:
        """The demand that approximate policies make of the recorded one."""
        stage, policies, cache = self._stage, self._policies, self.cache
        recording, layer = stage.recording, stage.recording.head.routed[place]
        rows = Rows(*recording.rows(parts, place))
        degraded, given = np.zeros(len(rows.experts), np.float32), rows.weights.sum(axis=1)
        if not policies.routing.exact:
            scores = recording.signal("scores", parts, place)
            assert scores is not None
            asks = "hidden" in policies.routing.needs
            hidden = recording.signal("hidden", parts, place) if asks else None
            choice = choice_of(layer, rows, scores, self._phase, hidden)
            there = cache.ready[layer, None, : scores.shape[1]]
            if len(scores) > 1:
                there = np.broadcast_to(there, scores.shape)
            served = reroute(policies.routing, choice, there)
            rows, degraded = served.rows, degraded + served.degraded
            stage.metrics.now.rerouted += served.rerouted
        if not policies.thinning.exact and route is not None:
            served = thin(policies.thinning, route, cache.begin_layer(layer, route), rows)
            rows, degraded = served.rows, degraded + served.degraded
        lost = float(np.minimum(degraded, given).sum())
        stage.metrics.count_weight(layer, float(given.sum()), lost)
        return demand_of(layer, *rows, recording.head.experts)

    def _count_worse(self, demand: Demand, ready: Sequence[int]) -> None:
        """Count what is served in another precision than the checkpoint's."""
        weight = demand.weight[demand.experts.searchsorted(ready)]
        worse = weight[self.cache.precision[demand.layer, ready] > 0]
        given = 0.0 if self._changes else float(weight.sum())  # or else it was counted before
        lost = float(worse.sum()) if len(worse) else 0.0
        self._stage.metrics.count_weight(demand.layer, given, lost)
