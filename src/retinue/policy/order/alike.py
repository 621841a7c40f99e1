"""Who goes first: requests that will use the same experts run side by side.

The token scheduler of ExpertFlow (arXiv 2410.17954) regroups the tokens of two adjacent batches
into two that together touch the fewest distinct experts: balanced 2-means on 1 - Hamming / (L * E)
of the predicted routing paths. Deviations: requests are regrouped, not tokens, since a request has
one token in a pass; a request's path is that of its prompt; and nobody waits for ever: those go
first who are grouped with the one admitted first, and whoever has waited for `PATIENCE_S` is
overtaken by nobody who came later.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import BoolArray
from retinue.policy.order.base import Job, Queues
from retinue.policy.order.estimate import PATIENCE_S, Estimate
from retinue.policy.order.fcfs import Fcfs
from retinue.policy.policies import Paths
from retinue.types import FloatArray, Phase

ROUNDS = 10  # of 2-means, which settles in two or three
KEPT = 256  # paths that are remembered


class Alike:
    """Groups by `paths`. Nobody is refused for time."""

    def __init__(self, estimate: Estimate, paths: Paths) -> None:
        self._paths, self._plain = paths, Fcfs()
        self._known: dict[int, tuple[Job, FloatArray]] = {}  # by the job's identity
        self.passed, self.loaded, self.ended = estimate.passed, estimate.loaded, estimate.ended

    def refuse(self, job: Job, queues: Queues) -> float | None:
        """Never."""
        return None

    def first(self, queues: Queues) -> int | None:
        """Of as many as fill the seats once more, the one most like those that run."""
        waiting = queues.waiting[: queues.seats]
        if not queues.running or queues.now - waiting[0].arrived >= PATIENCE_S:
            return 0
        running = np.mean([self._path(job) for job in queues.running], axis=0)
        return min(range(len(waiting)), key=lambda at: _apart(self._path(waiting[at]), running))

    def rank(self, jobs: Sequence[Job], phase: Phase) -> list[int]:
        """The half that the first one is in, then the other; each as they were admitted."""
        if phase == "prefill" or len(jobs) < 3:
            return list(range(len(jobs)))
        other = halves(np.stack([self._path(job) for job in jobs]))
        return [*np.flatnonzero(~other).tolist(), *np.flatnonzero(other).tolist()]

    def chunk(self, queues: Queues, after: Phase) -> int:
        """All of a pass in turn."""
        return self._plain.chunk(queues, after)

    def _path(self, job: Job) -> FloatArray:
        """1 for each expert that the job is likely to use: [rows * experts]."""
        found = self._known.get(id(job))
        if found is None or found[0] is not job:  # another one may have had the same identity
            path = self._paths(np.array(job.prompt, dtype=np.int64)).ravel()
            found = self._known[id(job)] = (job, path.astype(np.float32))
            if len(self._known) > KEPT:
                del self._known[next(iter(self._known))]
        return found[1]


def _apart(path: FloatArray, middle: FloatArray) -> float:
    """The Hamming distance of two paths; of a path and a mean of some, the mean distance."""
    return float(np.abs(path - middle).sum())


def halves(paths: FloatArray) -> BoolArray:
    """Balanced 2-means on the Hamming distance: who is not in the half of the first one.

    paths: [requests, bits]; the first one's half has one more if their number is odd.
    """
    count = len(paths)
    middles = paths[[0, int(_distances(paths, paths[:1])[:, 0].argmax())]]
    other = np.zeros(count, dtype=bool)
    for _ in range(ROUNDS):
        apart = _distances(paths, middles)
        order = np.argsort(apart[:, 0] - apart[:, 1], kind="stable")
        now = np.zeros(count, dtype=bool)
        now[order[(count + 1) // 2 :]] = True
        if (now == other).all():
            break
        other = now
        middles = np.stack([paths[~other].mean(axis=0), paths[other].mean(axis=0)])
    return ~other if other[0] else other


def _distances(paths: FloatArray, middles: FloatArray) -> FloatArray:
    """Mean Hamming distances: [requests, middles]."""
    return np.asarray(np.abs(paths[:, None] - middles).sum(axis=2), dtype=np.float32)
