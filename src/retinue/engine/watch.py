"""Whether decoding is far slower than this machine should be, said once, with the likely reason.

What is expected follows from what a run really read and used, so that routing which finds little in
memory is no alarm; only a machine or a path that gives less than was measured is one.
"""

from dataclasses import dataclass, field

from retinue.engine.bands import Band, Machine, Reads, compute_format, decode_band
from retinue.memory.machine import CoreTimes, core_times, cores
from retinue.metrics import PhaseCounters
from retinue.types import Facts

LEAST_STEPS = 8  # before a speed is judged
LONG_S = 10.0  # of decoding, before it is judged while it goes on
FAR_BELOW = 0.5  # of the low end
MANY_CORES = 0.5  # that other programs take


@dataclass(slots=True)
class Watch:
    """Sees what decoding costs. Judges one sequence; of several at once it says nothing."""

    facts: Facts
    machine: Machine
    counters: PhaseCounters  # of decoding, as they grow
    told: bool = False
    began: CoreTimes = field(default_factory=core_times)

    def during(self) -> str:
        """What to say now, while it decodes; empty if nothing."""
        return self._judge() if self.counters.seconds >= LONG_S else ""

    def after(self) -> str:
        """What to say at the end; empty if nothing, or if it was said."""
        return self._judge()

    def _judge(self) -> str:
        seen = self.counters
        if self.told or seen.passes < LEAST_STEPS or seen.tokens > seen.passes:
            return ""
        band = expected(self.facts, self.machine, seen)
        speed = seen.passes / seen.seconds
        if band is None or speed >= FAR_BELOW * band.low:
            return ""
        self.told = True
        others = self.began.others_until(core_times())
        return (
            f"slow: {speed:.2f} tokens/s, where this machine should give {band.low:.2f} to"
            f" {band.high:.2f}; {_reason(self.facts, self.machine, seen, others)}"
        )


def expected(facts: Facts, machine: Machine, seen: PhaseCounters) -> Band | None:
    """The speed to expect for what `seen` read and used; None where nothing was measured."""
    if not seen.passes or compute_format(facts) not in machine.rates:
        return None
    used = (seen.hits + seen.pending + seen.misses) / seen.passes
    read = seen.used_bytes_read / seen.passes
    return decode_band(facts, machine, used, Reads(read, read))


def _reason(facts: Facts, machine: Machine, seen: PhaseCounters, others: float) -> str:
    if others >= MANY_CORES:
        return f"other programs took {others:.1f} of {cores()} cores"
    multiplied_s = seen.expert_s + seen.dense_s
    parts = {"read": seen.stall_s, "multiply": multiplied_s, "rest": seen.overhead_s}
    most = max(parts, key=parts.__getitem__)
    share = f"{parts[most] / seen.seconds:.0%} of the time"
    if most == "read":
        rate, known = seen.bytes_read / seen.seconds, machine.speeds.disk_bytes_per_s
        return f"{share} it waited for reads: {_of(rate, known)} of the disk"
    if most == "multiply":
        used = seen.hits + seen.pending + seen.misses
        weights = seen.passes * facts.dense_bytes_per_token + used * facts.expert_bytes
        known = machine.rates[compute_format(facts)].row_bytes_per_s
        return f"{share} it multiplied: {_of(weights / multiplied_s, known)} of weights"
    return f"{share} it neither read nor multiplied"


def _of(rate: float, known: float) -> str:
    return f"{rate / 1e9:.2f} of {known / 1e9:.2f} GB/s"
