"""Who goes first: who came first. Nobody is refused for time; prefill and decode take turns."""

from collections.abc import Sequence

from retinue.metrics import PhaseCounters
from retinue.policy.order.base import Job, Queues
from retinue.types import Phase


class Fcfs:
    """First come, first served."""

    def refuse(self, job: Job, queues: Queues) -> float | None:
        """Never."""
        return None

    def first(self, queues: Queues) -> int | None:
        """Who waits longest."""
        return 0

    def rank(self, jobs: Sequence[Job], phase: Phase) -> list[int]:
        """As they were admitted."""
        return list(range(len(jobs)))

    def chunk(self, queues: Queues, after: Phase) -> int:
        """All of a pass in turn."""
        return 0 if after == "prefill" else queues.chunk

    def passed(self, phase: Phase, cost: PhaseCounters) -> None:
        """Nothing to learn."""

    def loaded(self, bytes_read: int, seconds: float) -> None:
        """Nothing to learn."""

    def ended(self, job: Job) -> None:
        """Nothing to learn."""
