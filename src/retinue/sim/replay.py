"""Replays a recording through a preset's policies, on a simulated clock.

The same objects decide as in the engine; what is simulated is the link, the slots and the time that
computing takes.
"""

from dataclasses import dataclass, field
from typing import Protocol

from retinue.memory.base import Sizes
from retinue.metrics import Metrics, PhaseCounters
from retinue.policy.order.cohort import Cohort
from retinue.policy.policies import Policies
from retinue.sim.attended import Attended
from retinue.sim.fixed import Beforehand, Fixed
from retinue.sim.passes import Pass, Passes
from retinue.sim.recorded import Part, Recording
from retinue.sim.stage import Setting, Stage
from retinue.types import Demand, Phase


class Layers(Protocol):
    """What runs layers under one preset: `Attended` or `Fixed`."""

    def begin(self, request: int) -> None: ...

    def end(self, request: int) -> None: ...

    def begin_pass(self, phase: Phase) -> None: ...

    def end_pass(self) -> None: ...

    def finish(self) -> None: ...

    def layer(self, place: int, demand: Demand, parts: list[Part], tokens: int) -> None: ...


@dataclass(slots=True)
class Outcome:
    """What a replay cost. `first_token_s` are from each request's arrival, as they came."""

    metrics: Metrics
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
    """One replay: `run` it once. `known` is for presets with a placement."""

    def __init__(
        self,
        recording: Recording,
        policies: Policies,
        setting: Setting,
        sizes: Sizes,
        known: Beforehand | None = None,
    ) -> None:
        head, self._recording = recording.head, recording
        self._stage = stage = Stage(recording, setting, sizes)
        self._layers: Layers
        if policies.placement.fixed:
            self._layers = Fixed(stage, policies, known or Beforehand())
        else:
            self._layers = Attended(stage, policies)
        self._cohort = Cohort(
            layers=len(head.routed), experts=head.experts, top_k=head.top_k, slots=setting.slots
        )
        self._passes = Passes(recording.requests, setting.load, self._cohort)
        self._outcome = Outcome(stage.metrics)

    def run(self) -> Outcome:
        """Replay it all."""
        link, passes, layers = self._stage.link, self._passes, self._layers
        while (now := passes.next(link.now, link.advance_to)) is not None:
            for request in now.begun:
                layers.begin(request)
            self._pass(now)
            for request in passes.ran(now):
                layers.end(request)
            self._note(now)
        layers.finish()
        self._outcome.seconds = link.now
        return self._outcome

    def _pass(self, now: Pass) -> None:
        """One pass through all layers, and what it cost."""
        stage, layers = self._stage, self._layers
        link, times = stage.link, stage.times
        started, read = link.now, link.bytes_read
        counters = stage.metrics.begin(now.phase)
        layers.begin_pass(now.phase)
        tokens = sum(part.stop - part.start for part in now.parts)
        link.advance(times.pass_s)
        layer_s = times.layer(tokens)
        for place, demand in enumerate(self._recording.demands(now.parts)):
            link.advance(layer_s - times.held_s)
            link.hold(times.held_s)
            layers.layer(place, demand, now.parts, tokens)
        layers.end_pass()
        counters.passes, counters.tokens = 1, tokens
        counters.seconds = link.now - started
        counters.dense_s = times.pass_s + layer_s * len(self._recording.head.routed)
        counters.bytes_read = link.bytes_read - read
        stage.metrics.finish()
        if now.phase == "decode":
            self._cohort.observe(counters, len(now.parts), now.ready)

    def _note(self, done: Pass) -> None:
        """Note when requests have had their first token: with the last one of their prompt."""
        arrivals = self._stage.setting.load.arrivals
        for part in done.parts:
            if part.stop == self._recording.requests[part.request].prompt_tokens:
                came = arrivals[part.request] if arrivals else 0.0
                self._outcome.first_token_s.append(self._stage.link.now - came)
