"""Every counter of the engine, named once. Plain numbers, written by the engine thread."""

from dataclasses import dataclass, field

from retinue.types import Phase


@dataclass(slots=True)
class PhaseCounters:
    """What one phase of one request cost."""

    tokens: int = 0
    seconds: float = 0.0
    hits: int = 0  # distinct experts of a layer and step that were resident
    pending: int = 0  # on their way, so that the step had to wait: a stall
    misses: int = 0
    bytes_read: int = 0  # everything the mover read, useful or not
    used_bytes_read: int = 0  # of experts that were read and then used
    routed_weight: float = 0.0  # what the routers gave, where a policy may choose otherwise
    rerouted: int = 0  # tokens' chosen experts that another one served
    degraded_weight: float = 0.0  # of it, not served by the expert that the router chose
    stall_s: float = 0.0  # time in which a layer had nothing to compute and waited for reads
    steps_s: list[float] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Hits over all lookups; 1 when nothing was looked up."""
        total = self.hits + self.pending + self.misses
        return self.hits / total if total else 1.0

    @property
    def degraded_share(self) -> float:
        """The part of routing weight that another expert served; 0 where nothing was rerouted."""
        return self.degraded_weight / self.routed_weight if self.routed_weight else 0.0


@dataclass(slots=True)
class Metrics:
    """Counters by phase since the last `reset`; `phase` is the one that runs."""

    prefill: PhaseCounters = field(default_factory=PhaseCounters)
    decode: PhaseCounters = field(default_factory=PhaseCounters)
    phase: Phase = "prefill"

    @property
    def now(self) -> PhaseCounters:
        """The counters of the running phase."""
        return self.prefill if self.phase == "prefill" else self.decode

    def reset(self) -> None:
        """Start counting again, for a new request."""
        self.prefill, self.decode = PhaseCounters(), PhaseCounters()
