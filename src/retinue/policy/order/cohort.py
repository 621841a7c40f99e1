"""How many sequences decode in one pass when their experts do not all fit into memory.

Sequences that decode together share experts, and the reading of them. But each sequence also comes
back to the experts of its last tokens, and the more sequences run, the sooner these have had to
leave. So two sizes are compared: as many as find room for their experts, and all. What each one
would read follows from the routing alone, so that the choice never depends on how fast the disk
happens to be.
"""

from retinue.metrics import PhaseCounters

LOOK_STEPS, STAY_STEPS = 8, 64


class Cohort:
    """The size of decode passes over `layers` layers that choose `top_k` of `experts` a token."""

    def __init__(self, *, layers: int, experts: int, top_k: int, slots: int) -> None:
        self._layers, self._experts, self._slots = layers, experts, slots
        self._unused = 1 - min(top_k, experts) / experts  # chance that a token leaves an expert be
        self.fitting = 1
        while self.fitting < 1024 and self._distinct(self.fitting + 1) * layers <= slots:
            self.fitting += 1
        self._looked = self._repeated = self._steps = 0
        self._stay = 0  # steps for which all run

    def size(self, ready: int) -> int:
        """How many of `ready` sequences shall decode in the next pass."""
        everyone = ready <= self.fitting or self._slots >= self._layers * self._experts
        return ready if everyone or self._stay else self.fitting

    def observe(self, counters: PhaseCounters, ran: int, ready: int) -> None:
        """See a decode pass of `ran` of `ready` sequences."""
        if self._stay:
            self._stay -= 1
        if ran != self.fitting or ran == ready:
            return
        self._looked += counters.hits + counters.pending + counters.misses
        self._repeated += counters.repeated
        self._steps += 1
        if self._steps < LOOK_STEPS:
            return
        repeats = self._repeated / max(1, self._looked)
        # What the last passes used is still there; of all experts, a layer keeps its share.
        few = self._distinct(ran) * (1 - repeats) / ran
        kept = min(1.0, self._slots / self._layers / self._distinct(ready))
        many = self._distinct(ready) * (1 - kept) / ready
        self._stay = STAY_STEPS if many < few else 0
        self._looked = self._repeated = self._steps = 0

    def _distinct(self, sequences: int) -> float:
        """Experts of one layer that `sequences` tokens use together, if they choose evenly."""
        return self._experts * (1 - self._unused**sequences)
