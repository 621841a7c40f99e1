"""Who goes first: who is expected to be done soonest, and whoever has waited long enough."""

from collections.abc import Sequence

from retinue.policy.order.base import Job, Queues
from retinue.policy.order.estimate import PATIENCE_S, Estimate
from retinue.policy.order.fcfs import Fcfs
from retinue.types import Phase


class Shortest:
    """The shortest expected job first, with ageing. Nobody is refused for time."""

    def __init__(self, estimate: Estimate) -> None:
        self._estimate, self._plain = estimate, Fcfs()
        self.passed, self.loaded, self.ended = estimate.passed, estimate.loaded, estimate.ended

    def refuse(self, job: Job, queues: Queues) -> float | None:
        """Never."""
        return None

    def first(self, queues: Queues) -> int | None:
        """The shortest; once somebody has waited for `PATIENCE_S`, whoever waits longest."""
        if queues.now - queues.waiting[0].arrived >= PATIENCE_S or not self._estimate.costs.known:
            return 0
        return min(range(len(queues.waiting)), key=lambda at: self._seconds(queues, at))

    def rank(self, jobs: Sequence[Job], phase: Phase) -> list[int]:
        """As they were admitted."""
        return self._plain.rank(jobs, phase)

    def chunk(self, queues: Queues, after: Phase) -> int:
        """All of a pass in turn."""
        return self._plain.chunk(queues, after)

    def _seconds(self, queues: Queues, at: int) -> float:
        job, known = queues.waiting[at], self._estimate
        own = known.lengths.left(job) * known.step_s(1)
        return known.costs.prompts(job.prompt_left, queues.chunk) + own
