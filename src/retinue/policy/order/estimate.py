"""When tokens will come: by what passes cost, what runs, and how long answers get."""

import heapq
from collections.abc import Callable, Sequence

from retinue.metrics import PhaseCounters
from retinue.policy.costs import CostModel, Lengths
from retinue.policy.order.base import Job, Queues
from retinue.types import Phase

PATIENCE_S = 30.0  # who has waited so long is overtaken by nobody any more
Loads = Callable[[str | None], int]  # experts that a request of a task would have read


class Estimate:
    """What the orders know: costs, lengths, and which experts a task would load."""

    def __init__(
        self,
        costs: CostModel | None = None,
        lengths: Lengths | None = None,
        loads: Loads | None = None,
        expert_bytes: int = 1,
    ) -> None:
        self._expert_bytes = expert_bytes
        self.costs, self.lengths = costs or CostModel(), lengths or Lengths()
        self.loads: Loads = loads or (lambda task: 0)

    def load_s(self, task: str | None) -> float:
        """Seconds for the experts that a request of `task` would load; 0 where nothing is known."""
        count = self.loads(task) if self.costs.load.known else 0
        return self.costs.load.at(count) if count else 0.0

    def passed(self, phase: Phase, cost: PhaseCounters) -> None:
        """A pass has ended."""
        self.costs.observe(phase, cost)

    def loaded(self, bytes_read: int, seconds: float) -> None:
        """Experts were loaded."""
        self.costs.load.observe(bytes_read / self._expert_bytes, seconds)

    def ended(self, job: Job) -> None:
        """`job` was answered to its end."""
        self.lengths.observe(job.task, job.answered)

    def step_s(self, requests: int) -> float:
        """Seconds of a decode pass."""
        return self.costs.decode.at(requests)

    def latencies(self, queues: Queues, joining: Job | None = None) -> list[float]:
        """Seconds from arrival to the last token of each that runs, if `joining` runs as well.

        eMoE's estimate (2503.06823), t_i = dE + (W + sum_j min(G_j, G_i)) * c + r_i, with W the
        tokens of prompts that are still to be read, G_j the tokens that request j has left, r_i
        the time since its arrival, and dE that of loading. Deviations: the paper has
        `n_i * G_i` with the number of those that end after i, which leaves out i's own tokens and
        those of requests that end sooner; and c has a base for each pass and two slopes.
        """
        everyone = [*queues.running, joining] if joining is not None else [*queues.running]
        left = [self.lengths.left(job) for job in everyone]
        prompts = sum(job.prompt_left for job in everyone)
        before = self.costs.prompts(prompts, queues.chunk)
        before += self.load_s(joining.task) if joining is not None else 0.0
        base, slope = self.costs.decode.parts
        found = []
        for job, mine in zip(queues.running, left, strict=False):
            tokens = sum(min(mine, other) for other in left)
            passes = max(mine, tokens / queues.together)
            spent = queues.now - job.arrived
            found.append(before + passes * base + tokens * slope + spent)
        return found

    def first_tokens(self, queues: Queues, coming: Sequence[Job]) -> list[float]:
        """Seconds until the first token of each of `coming`, who are admitted in this order.

        A seat is free when an answer ends; prompts are read in turn with decoding. Room for keys
        and values is taken to be there.
        """
        chunk, together = queues.chunk, max(1, queues.together)
        steps = 0.0  # tokens that each one that decodes has got until then
        time_s = self.costs.prompts(sum(job.prompt_left for job in queues.running), chunk)
        ends = [self.lengths.left(job) for job in queues.running]
        heapq.heapify(ends)
        found = []
        for job in coming:
            while len(ends) >= queues.seats:
                end = heapq.heappop(ends)
                slower = max(1.0, (len(ends) + 1) / together)
                if end > steps:
                    time_s += (end - steps) * slower * self.step_s(min(len(ends) + 1, together))
                    steps = end
            passes = -(-job.prompt_left // chunk)
            time_s += self.costs.prompts(job.prompt_left, chunk)
            if ends:
                time_s += (passes - 1) * self.step_s(min(len(ends), together))
            found.append(time_s)
            if ends:
                time_s += self.step_s(min(len(ends), together))
                steps += passes * min(1.0, together / len(ends))
            heapq.heappush(ends, steps + self.lengths.left(job))
        return found
