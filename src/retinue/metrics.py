"""Every counter of the engine, named once. Plain numbers, written by the engine thread."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Self

import numpy as np

from retinue.types import FloatArray, Phase


@dataclass(slots=True)
class Clock:
    """Seconds that one kind of work has taken so far, written by the engine thread."""

    seconds: float = 0.0


@dataclass(slots=True)
class Line:
    """A straight line through points that come one by one: least squares, in sums that add up."""

    weight: float = 0.0  # of all points
    x: float = 0.0  # the weighted sum of it, and so on
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def point(self, x: float, y: float, weight: float = 1.0) -> None:
        """One more, which counts as `weight` of them."""
        self.weight += weight
        self.x += weight * x
        self.y += weight * y
        self.xx += weight * x * x
        self.xy += weight * x * y

    def fade(self, share: float) -> None:
        """Let what was seen so far count for `share` of what it did."""
        for item in fields(self):
            setattr(self, item.name, share * getattr(self, item.name))

    def __iadd__(self, other: "Line") -> Self:
        """The points of both."""
        self.weight += other.weight
        self.x += other.x
        self.y += other.y
        self.xx += other.xx
        self.xy += other.xy
        return self

    @property
    def spread(self) -> float:
        """How far x varies, in all: the sum of squares from its mean. What a slope is worth."""
        return max(0.0, self.xx - self.x * self.x / self.weight) if self.weight else 0.0

    @property
    def slope(self) -> float | None:
        """What one more of x adds to y; None where x is always the same.

        At least 0: over few points chance may say that more work takes less time.
        """
        if self.spread <= 1e-9 * self.xx:
            return None
        return max(0.0, (self.xy - self.x * self.y / self.weight) / self.spread)


@dataclass(slots=True)
class PhaseCounters:
    """What forward passes of one phase cost."""

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    hits: int = 0  # distinct experts of a layer and step that were resident
    pending: int = 0  # on their way, so that the step had to wait: a stall
    misses: int = 0
    repeated: int = 0  # of all three, those that one of the last passes used as well
    bytes_read: int = 0  # everything the mover read, useful or not
    used_bytes_read: int = 0  # of experts that were read and then used
    routed_weight: float = 0.0  # what the routers gave, where a policy may choose otherwise
    missed: int = 0  # tokens' chosen experts that were not there, where others may serve
    fetched: int = 0  # of those, read for their token, each as if it were decoded by itself
    fetched_bytes: int = 0  # which that would have read; a pass reads an expert once for all tokens
    rerouted: int = 0  # tokens' chosen experts that another one served
    degraded_weight: float = 0.0  # of it, not served by the expert that the router chose
    stall_s: float = 0.0  # time in which a layer had nothing to compute and waited for reads
    expert_s: float = 0.0  # in the routed experts' matrices, and in summing what they gave
    # In linear layers and attention outside of routed experts; in a prepared step, in all that
    # runs natively between them.
    dense_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    reads: int = 0  # that were started
    lacking: int = 0  # layers that lacked an expert when their turn came
    looks: int = 0  # layers from which somebody looked ahead
    starting: Line = field(default_factory=Line)  # a pass's `overhead_s` by its `reads`
    computing: Line = field(default_factory=Line)  # a pass's `expert_s` by its `lacking`

    @property
    def hit_rate(self) -> float:
        """Hits over all lookups; 1 when nothing was looked up."""
        total = self.hits + self.pending + self.misses
        return self.hits / total if total else 1.0

    @property
    def overhead_s(self) -> float:
        """The rest: norms, routers, look-ahead, books, Python. The four add up to `seconds`."""
        return self.seconds - self.stall_s - self.expert_s - self.dense_s

    @property
    def degraded_share(self) -> float:
        """The part of routing weight that another expert served; 0 where nothing was rerouted."""
        return self.degraded_weight / self.routed_weight if self.routed_weight else 0.0

    @property
    def counts(self) -> dict[str, int]:
        """How often what a replay takes times of was done."""
        return {"reads": self.reads, "lacking": self.lacking, "looks": self.looks}

    def add(self, other: "PhaseCounters", *, tokens: int | None = None) -> None:
        """Count `other` as well; `tokens` instead of its own, where a request had a part in it."""
        for name in _COUNTED:
            mine = getattr(self, name)
            mine += getattr(other, name)  # a list grows in place: it is not copied each time
            setattr(self, name, mine)
        if tokens is not None:
            self.tokens += tokens - other.tokens


_COUNTED = tuple(item.name for item in fields(PhaseCounters))


@dataclass(slots=True)
class Costs:
    """Counters by phase: of a request (all of the passes that it took part in), or of a process."""

    prefill: PhaseCounters = field(default_factory=PhaseCounters)
    decode: PhaseCounters = field(default_factory=PhaseCounters)

    def of(self, phase: Phase) -> PhaseCounters:
        """The counters of `phase`."""
        return self.prefill if phase == "prefill" else self.decode


@dataclass(slots=True)
class Usage:
    """What the routers chose for one request, and how much of it others had to serve.

    Where the preset is exact, only `used` is counted.
    """

    used: (
        FloatArray  # [layers, experts], the prompt's routing weight as the routers themselves chose
    )
    routed: FloatArray  # [layers], all routing weight
    degraded: FloatArray  # [layers], of it, not served by the expert that the router chose
    missed: int = 0  # tokens' chosen experts that were not there
    fetched: int = 0  # of those, read for their token

    @classmethod
    def none(cls, layers: int, experts: int) -> "Usage":
        """Nothing yet."""
        used = np.zeros((layers, experts), dtype=np.float32)
        return cls(used, np.zeros(layers, dtype=np.float32), np.zeros(layers, dtype=np.float32))

    @property
    def degraded_share(self) -> float:
        """The part of all routing weight that another expert served."""
        routed = float(self.routed.sum())
        return float(self.degraded.sum()) / routed if routed else 0.0

    @property
    def degraded_by_layer(self) -> list[float]:
        """The same for each layer; 0 for one without routed experts."""
        routed = np.where(self.routed > 0, self.routed, 1.0)
        return [float(share) for share in self.degraded / routed]

    def plus(self, other: "Usage") -> "Usage":
        """Both together."""
        both = Usage(self.used.copy(), self.routed.copy(), self.degraded.copy())
        both.missed, both.fetched = self.missed, self.fetched
        both.add(other)
        return both

    def add(self, other: "Usage") -> None:
        """Count `other` here as well."""
        self.used += other.used
        self.routed += other.routed
        self.degraded += other.degraded
        self.missed += other.missed
        self.fetched += other.fetched


@dataclass(slots=True)
class LayerCounters:
    """What the routers of one layer asked for in one phase: as in `PhaseCounters`."""

    hits: int = 0
    pending: int = 0
    misses: int = 0
    missed: int = 0
    fetched: int = 0
    routed_weight: float = 0.0
    degraded_weight: float = 0.0


@dataclass(slots=True)
class Metrics:
    """`now` counts the forward pass that runs, `total` all that succeeded.

    `layers` counts by phase and layer, passes that failed included.
    """

    now: PhaseCounters = field(default_factory=PhaseCounters)
    total: Costs = field(default_factory=Costs)
    phase: Phase = "prefill"
    layers: dict[tuple[Phase, int], LayerCounters] = field(default_factory=dict)
    refreshes: int = 0  # times that the resident set was chosen anew, without the first
    refresh_s: float = 0.0  # what that took, forecasts and reads included
    refresh_bytes: int = 0
    _tasks: dict[str | None, Usage] = field(default_factory=dict)

    @property
    def tasks(self) -> Mapping[str | None, Usage]:
        """What the routers chose and what was degraded, by task and layer, since the start."""
        return MappingProxyType(self._tasks)

    def account(self, task: str | None, usage: Usage) -> None:
        """Count what a pass that succeeded did for a request of `task`."""
        if task not in self._tasks:
            self._tasks[task] = Usage.none(*usage.used.shape)
        self._tasks[task].add(usage)

    def count(self, layer: int, hits: int, pending: int = 0, misses: int = 0) -> None:
        """Count what one layer of the running pass looked up."""
        self.now.lacking += bool(pending or misses)
        now, here = self.now, self._layer(layer)
        now.hits += hits
        here.hits += hits
        if pending or misses:
            for counters in (now, here):
                counters.pending += pending
                counters.misses += misses

    def count_choices(self, layer: int, missed: int, fetched: int) -> None:
        """Count tokens' choices that were not there, and those of them that were read."""
        for counters in (self.now, self._layer(layer)):
            counters.missed += missed
            counters.fetched += fetched

    def count_weight(self, layer: int, routed: float, degraded: float) -> None:
        """Count what a layer's routers gave, and what of it other experts served."""
        for counters in (self.now, self._layer(layer)):
            counters.routed_weight += routed
            counters.degraded_weight += degraded

    def _layer(self, layer: int) -> LayerCounters:
        key = (self.phase, layer)
        found = self.layers.get(key)
        if found is None:
            found = self.layers[key] = LayerCounters()
        return found

    def begin(self, phase: Phase) -> PhaseCounters:
        """A pass of `phase` starts; returns its counters."""
        self.phase, self.now = phase, PhaseCounters()
        return self.now

    def charge(self, seconds: float) -> None:
        """Count what had to be done before the pass that has just succeeded."""
        for counters in (self.now, self.total.of(self.phase)):
            counters.seconds += seconds

    def finish(self) -> None:
        """The pass succeeded. The total keeps no times of single steps: it would grow for ever."""
        now = self.now
        now.starting.point(now.reads, now.overhead_s)
        now.computing.point(now.lacking, now.expert_s)
        total = self.total.of(self.phase)
        total.add(self.now)
        total.steps_s.clear()
