"""What a pass and a read cost here, and how long answers get: learnt from what has run.

A pass costs `base + tokens * slope` seconds, prefill and decode apart, and so does loading experts.
The reads that a pass waits for are in its seconds, so that they count as much as they cost. What a
profile knows counts as a few observations, and fades like any other.
"""

from collections.abc import Callable

from retinue.metrics import Line, PhaseCounters
from retinue.policy.measured import MachineCosts
from retinue.policy.order.base import Job
from retinue.types import Phase

FADE = 0.97  # what a pass still counts after the next one
FADE_LENGTH = 0.99
LEAST = 8.0  # passes before a line says anything, and before an outlier is known as such
OUTLIER = 3.0  # times what was expected: more counts as so much
PRIOR = 16.0  # passes, or answers, that a profile's word counts for
FAR = 64.0  # tokens or experts, at which a profile's line is taken over
STILL_ALIVE = 0.05  # of the length expected, for an answer that is longer than that


class FadingLine:
    """A running fit of `y = base + slope * x`, neither of them below 0; what is past fades."""

    def __init__(self) -> None:
        self._seen = Line()

    @property
    def known(self) -> bool:
        """Whether enough was seen to say anything."""
        return self._seen.weight >= LEAST

    def observe(self, x: float, y: float, weight: float = 1.0) -> None:
        """See one value, among many others: one far out counts as a little out."""
        if self.known:
            y = min(y, OUTLIER * self.at(x))
        self._seen.fade(FADE)
        self._seen.point(x, y, weight)

    def take_over(self, base: float, slope: float) -> None:
        """Begin with a line that was measured before."""
        for x in (1.0, FAR):
            self.observe(x, base + slope * x, PRIOR / 2)

    @property
    def parts(self) -> tuple[float, float]:
        """Base and slope."""
        seen = self._seen
        if not seen.weight:
            return 0.0, 0.0
        slope = seen.slope
        if slope is None:  # always the same x: nothing says what others would cost
            return 0.0, seen.y / seen.x if seen.x else 0.0
        base = (seen.y - slope * seen.x) / seen.weight
        return (base, slope) if base >= 0 else (0.0, seen.xy / seen.xx)

    def at(self, x: float) -> float:
        """What is to be expected at `x`."""
        base, slope = self.parts
        return base + slope * x


class CostModel:
    """Seconds of passes and of loading experts."""

    def __init__(self) -> None:
        self.prefill, self.decode, self.load = FadingLine(), FadingLine(), FadingLine()

    def take_over(self, measured: MachineCosts) -> None:
        """Begin with what was measured on this machine before."""
        for line in (self.prefill, self.decode):
            line.take_over(measured.base_s, measured.token_s)
        self.load.take_over(measured.load_base_s, measured.load_s)

    @property
    def known(self) -> bool:
        """Whether both kinds of passes were seen."""
        return self.prefill.known and self.decode.known

    def observe(self, phase: Phase, cost: PhaseCounters) -> None:
        """See what a pass has cost, and what the experts that it missed."""
        line = self.prefill if phase == "prefill" else self.decode
        line.observe(cost.tokens, cost.seconds)
        if cost.misses:
            self.load.observe(cost.misses, cost.stall_s)

    def prompts(self, tokens: int, chunk: int) -> float:
        """Seconds of the passes that `tokens` of prompts take, `chunk` at most each."""
        base, slope = self.prefill.parts
        return -(-tokens // chunk) * base + tokens * slope


Expected = Callable[[str | None], float | None]


class Lengths:
    """How many tokens an answer of a task has: a mean over those that ended.

    `expected` is what a profile says of a task, and counts as a few answers; None: unknown. A task
    that nobody knows is as long as all together.
    """

    def __init__(self, expected: Expected | None = None) -> None:
        self._expected: Expected = expected or (lambda task: None)
        self._seen: dict[str | None, tuple[float, float]] = {}  # weight, sum
        self._all = (0.0, 0.0)

    def observe(self, task: str | None, tokens: int) -> None:
        """An answer of `task` has ended after so many."""
        weight, total = self._of(task)
        self._seen[task] = (FADE_LENGTH * weight + 1, FADE_LENGTH * total + tokens)
        self._all = (FADE_LENGTH * self._all[0] + 1, FADE_LENGTH * self._all[1] + tokens)

    def whole(self, job: Job) -> float:
        """Tokens that the answer of `job` will have, from what is known before it begins."""
        weight, total = self._of(job.task)
        if not weight:
            weight, total = self._all
        return min(job.longest, max(1.0, total / weight)) if weight else job.longest

    def left(self, job: Job) -> float:
        """Of these, those that are to come: the paper's G.

        An answer that is longer than expected has 5 % of that left, again and again.
        """
        whole = self.whole(job)
        left = whole - job.answered
        if left <= 0:
            more = max(1.0, STILL_ALIVE * whole)
            left = more - (-left) % more
        return max(1.0, min(left, job.longest - job.answered))

    def _of(self, task: str | None) -> tuple[float, float]:
        if task not in self._seen:
            known = self._expected(task)
            self._seen[task] = (PRIOR, PRIOR * known) if known is not None else (0.0, 0.0)
        return self._seen[task]
