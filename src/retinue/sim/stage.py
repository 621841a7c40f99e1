"""What a replay stands on: the recording, the link with its clock, times and counters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from retinue.memory.base import Sizes
from retinue.metrics import Metrics
from retinue.policy.base import Costs, Prompt, Route, Signal
from retinue.sim.costs import Times
from retinue.sim.link import Roads, SimulatedLink
from retinue.sim.passes import Load
from retinue.sim.recorded import Part, Recording
from retinue.types import Demand, IntArray


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a recording is replayed: room for `slots` experts, roads, times, requests.

    `own` are times of presets whose policies take a time of their own, by name.
    """

    slots: int
    roads: Roads
    times: Times
    load: Load = field(default_factory=Load)
    own: Mapping[str, Times] = field(default_factory=dict)

    def of(self, preset: str) -> "Setting":
        """With that preset's own times."""
        return replace(self, times=self.own.get(preset, self.times))


class Stage:
    """One replay's clock and counters. `sizes` are those of the model's experts."""

    def __init__(self, recording: Recording, setting: Setting, sizes: Sizes) -> None:
        self.recording, self.setting, self.sizes = recording, setting, sizes
        self.times, self.metrics = setting.times, Metrics()
        self.link = SimulatedLink(setting.roads, sizes, setting.times.start_s)

    @property
    def costs(self) -> Costs:
        """What policies may see of the times."""
        return self.times.shown(self.setting.roads, int(self.sizes.read_bytes[0].max()))

    def compute(
        self, demand: Demand, experts: Sequence[int], tokens: int, late_s: float = 0.0
    ) -> None:
        """Let the time pass that `experts` of `demand` take in a pass over `tokens` tokens.

        `late_s` is added for a layer that lacked some.
        """
        seconds = late_s + len(experts) * self.times.expert_s
        if tokens > 1:
            at = np.searchsorted(demand.experts, experts)
            seconds += int((demand.tokens[at] - 1).sum()) * self.times.expert_token_s
        self.metrics.now.expert_s += seconds
        self.link.advance(seconds)

    def start_elsewhere(self, demand: Demand, experts: IntArray) -> float:
        """Compute `experts` of `demand` at the second place; returns when they will be done."""
        if not len(experts):
            return self.link.now
        assert self.times.elsewhere_s is not None
        tokens = demand.tokens[np.searchsorted(demand.experts, experts)]
        seconds = float(tokens.sum()) * self.times.elsewhere_s
        self.metrics.now.expert_s += seconds
        return self.link.now + seconds

    def route(self, place: int, parts: Sequence[Part], needs: frozenset[Signal]) -> Route:
        """What the routers chose for the tokens of a pass in the layer at `place`."""
        recording = self.recording
        experts, weights = recording.rows(parts, place)
        sequences = np.array([part.request for part in parts])
        if len(parts) > 1 or len(experts) > 1:
            sequences = sequences.repeat([part.stop - part.start for part in parts])
        return Route(
            recording.head.routed[place],
            experts,
            weights,
            sequences,
            recording.signal("scores", parts, place) if "scores" in needs else None,
            recording.signal("hidden", parts, place) if "hidden" in needs else None,
            recording.token_ids(parts) if "token_ids" in needs else None,
        )

    def prompt(self, number: int) -> Prompt:
        """What is known of a request before its first pass."""
        request = self.recording.requests[number]
        ids = request.token_ids[: request.prompt_tokens]
        return Prompt(number, request.task, ids, request.signals.get("embedding"))
