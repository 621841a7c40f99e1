"""Who goes first: who has the least time left, as long as those that run keep their deadlines.

eMoE's task-aware scheduler (2503.06823). Its printed pseudo-code starts the count of tokens with
the length of a queue and adds a request that is already scheduled instead of the new one; here the
count is that of tokens, and the new one is added.

Beyond the paper: deadlines between tokens are kept as well, by the choice of the next pass and the
size of a prompt's chunk; whoever cannot be served in time is refused when it comes, and whoever is
late already does not make others late; of requests that are about equally urgent those go first
whose experts are there; and nobody waits for ever: whoever has waited for `PATIENCE_S` is overtaken
by nobody who came later. Where nobody has a deadline all are equally urgent: then it is first come,
first served, but for those who share experts with what is there. Until costs are known it is first
come, first served.
"""

import math
from collections.abc import Sequence

from retinue.policy.order.base import Job, Queues
from retinue.policy.order.estimate import PATIENCE_S, Estimate
from retinue.types import Deadline, Phase

LEAST_CHUNK = 32  # tokens: less costs more passes than it saves time
# Of the time that there is, what is planned with, as estimates are means: of a gap between tokens,
# which depends on one or two passes, and of the wait for a first token, which depends on how long
# the answers get that run before it.
SAFE, SAFE_FIRST = 0.9, 0.7
NO_DEADLINE = Deadline()


class Emoe:
    """Admission and order by deadlines."""

    def __init__(self, estimate: Estimate) -> None:
        self._estimate = estimate
        self.passed, self.loaded, self.ended = estimate.passed, estimate.loaded, estimate.ended

    def refuse(self, job: Job, queues: Queues) -> float | None:
        """How much too late `job` would come, or make another one come that waits already.

        Where nothing runs or waits it may try: an estimate that is wrong is put right only so.
        """
        idle = not queues.waiting and not queues.running
        if _due(job) == math.inf or idle or not self._estimate.costs.known:
            return None
        everyone = [*queues.waiting, job]
        coming = [everyone[at] for at in self._by_urgency(everyone, queues)]
        here = next(at for at, one in enumerate(coming) if one is job)
        after = self._estimate.first_tokens(queues, coming)
        late = queues.now + after[here] - _promise(job)
        if late > 0:
            return late
        behind = [at for at in range(here + 1, len(coming)) if _due(coming[at]) < math.inf]
        made_late = [at for at in behind if queues.now + after[at] > _due(coming[at])]
        if not made_late:
            return None
        before = self._estimate.first_tokens(queues, [one for one in coming if one is not job])
        harmed = [at for at in made_late if queues.now + before[at - 1] <= _due(coming[at])]
        return max((queues.now + after[at] - _due(coming[at]) for at in harmed), default=None)

    def first(self, queues: Queues) -> int | None:
        """The most urgent that makes nobody late who runs; one that has waited long, always."""
        waiting = queues.waiting
        if not self._estimate.costs.known:
            return 0
        if not _promised(queues):
            return self._sharing(waiting)
        order = self._by_urgency(waiting, queues)
        oldest = waiting[order[0]]
        if not queues.running or queues.now >= oldest.arrived + PATIENCE_S:
            return order[0]
        return next((at for at in order if self._fits(waiting[at], queues)), None)

    def rank(self, jobs: Sequence[Job], phase: Phase) -> list[int]:
        """Prompts and tokens by when they are due."""
        if not any(job.deadline for job in jobs):
            return list(range(len(jobs)))
        due = _next_due if phase == "decode" else _waits_until
        return sorted(range(len(jobs)), key=lambda at: due(jobs[at]))

    def chunk(self, queues: Queues, after: Phase) -> int:
        """In turn; a chunk is no longer than those that decode have time for."""
        if after == "prefill":
            return 0
        prompts = [job for job in queues.running if job.prompt_left]
        if any(queues.now >= job.arrived + PATIENCE_S for job in prompts):
            return queues.chunk
        least = min(LEAST_CHUNK, *(job.prompt_left for job in prompts))
        room = min(queues.chunk, self._room(queues, least))
        return int(room) if room >= least else 0

    def _room(self, queues: Queues, least: int) -> float:
        """Tokens of prompts that can be read before those that decode have to go on.

        A gap between tokens that not even `least` of them fit into cannot be kept, and counts not.
        """
        base, slope = self._estimate.costs.prefill.parts
        ready = [job for job in queues.running if not job.prompt_left]
        step_s = self._estimate.step_s(min(len(queues.running), queues.together))
        least_s = step_s + base + slope * (least + 1)  # one more, as numbers are rounded
        kept = [job for job in ready if _gap(job) * SAFE >= least_s]
        until = min((job.last_token_at + _gap(job) * SAFE for job in kept), default=math.inf)
        spare_s = until - queues.now - step_s - base
        return spare_s / slope if slope and spare_s < math.inf else math.inf

    def _by_urgency(self, jobs: Sequence[Job], queues: Queues) -> list[int]:
        """Places in `jobs`, by when each one has to begin at the latest to be in time.

        Whoever lacks experts goes back by as long as loading them takes: of equally urgent ones
        those go first that share experts, and nobody pays more for it than it saves. Who has no
        deadline, or missed it, is due at the end of `PATIENCE_S`.
        """
        known = self._estimate
        loads_s = {task: known.load_s(task) for task in {job.task for job in jobs}}

        def latest(at: int) -> float:
            job = jobs[at]
            patience = job.arrived + PATIENCE_S
            begin = _due(job) - known.costs.prompts(job.prompt_left, queues.chunk)
            if begin < queues.now or begin == math.inf:
                return patience
            return min(begin + loads_s[job.task], patience)

        return sorted(range(len(jobs)), key=latest)

    def _sharing(self, waiting: Sequence[Job]) -> int:
        """Who came first, if reading the experts that it lacks counts as a later arrival.

        Whoever lets others go first who need no reads saves that time for all that wait: by so much
        in all, and by no more than `PATIENCE_S`, may it be overtaken.
        """
        count, known = len(waiting), self._estimate
        later_s = {
            task: min(count * known.load_s(task), PATIENCE_S)
            for task in {job.task for job in waiting}
        }
        if len({*later_s.values()}) == 1:
            return 0
        return min(range(count), key=lambda at: waiting[at].arrived + later_s[waiting[at].task])

    def _fits(self, job: Job, queues: Queues) -> bool:
        """Whether `job` can run without making one late that runs and would be in time."""
        left = sum(one.prompt_left for one in queues.running)
        needs = job.prompt_left if queues.whole else 1
        if left and left + needs > queues.chunk:
            return False  # Tmax: the next pass has no room for it
        return self._keeps_gaps(job, queues) and self._keeps_ends(job, queues, left)

    def _keeps_gaps(self, job: Job, queues: Queues) -> bool:
        known, count = self._estimate, min(len(queues.running), queues.together)
        more = min(len(queues.running) + 1, queues.together)
        tokens = min(job.prompt_left, queues.chunk if queues.whole else LEAST_CHUNK)
        needs_s = known.step_s(more) + known.costs.prefill.at(tokens)
        now_s = known.step_s(count)
        return not any(now_s <= _gap(one) * SAFE < needs_s for one in queues.running)

    def _keeps_ends(self, job: Job, queues: Queues, left: int) -> bool:
        """The paper's test: nobody's first or last token becomes late."""
        known, chunk, now = self._estimate, queues.chunk, queues.now
        without = now + known.costs.prompts(left, chunk)
        joined = now + known.costs.prompts(left + job.prompt_left, chunk)
        joined += known.load_s(job.task)
        running = [one for one in queues.running if _whole_s(one, known) < math.inf]
        if any(one.prompt_left and without <= _due(one) < joined for one in queues.running):
            return False
        if not running:
            return True
        alone, both = known.latencies(queues), known.latencies(queues, job)
        return not any(
            a <= _whole_s(one, known) < b
            for one, a, b in zip(queues.running, alone, both, strict=True)
        )


def _promised(queues: Queues) -> bool:
    return any(job.deadline is not None for job in (*queues.waiting, *queues.running))


def _due(job: Job) -> float:
    """When the first token is due."""
    first_s = (job.deadline or NO_DEADLINE).first_token_s
    return math.inf if first_s is None else job.arrived + first_s


def _promise(job: Job) -> float:
    """When the first token has to be expected, for it to come in time after all."""
    return job.arrived + SAFE_FIRST * (_due(job) - job.arrived)


def _waits_until(job: Job) -> float:
    return min(_due(job), job.arrived + PATIENCE_S)


def _gap(job: Job) -> float:
    between_s = (job.deadline or NO_DEADLINE).between_tokens_s
    return math.inf if between_s is None else between_s


def _next_due(job: Job) -> float:
    return job.last_token_at + _gap(job)


def _whole_s(job: Job, known: Estimate) -> float:
    """Seconds that its deadlines allow it in all: the paper's SLO."""
    first_s = (job.deadline or NO_DEADLINE).first_token_s
    if first_s is None or _gap(job) == math.inf:
        return math.inf
    return first_s + (job.answered + known.lengths.left(job) - 1) * _gap(job)
