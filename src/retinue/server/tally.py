"""What was done so far, by task, and how fast tokens come now. Used on the loop only."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from retinue.engine.request import Request

WINDOW_S = 10.0  # of the speed


@dataclass(slots=True)
class TaskTally:
    """What became of the answers of one task."""

    answered: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    deadlines_met: int = 0  # answers each of whose tokens came in time
    deadlines_missed: int = 0
    routed_weight: float = 0.0
    degraded_weight: float = 0.0

    @property
    def degraded_share(self) -> float:
        """The part of routing weight that another expert served."""
        return self.degraded_weight / self.routed_weight if self.routed_weight else 0.0


@dataclass(slots=True)
class Tally:
    """All tasks, and the tokens of the last seconds."""

    clock: Callable[[], float] = time.monotonic
    tasks: dict[str | None, TaskTally] = field(default_factory=dict)
    _recent: deque[tuple[int, int]] = field(default_factory=deque)  # (second, tokens)

    def count(self, tokens: int) -> None:
        """Tokens that came now."""
        second = int(self.clock())
        if self._recent and self._recent[-1][0] == second:
            tokens += self._recent.pop()[1]
        self._recent.append((second, tokens))
        while self._recent[0][0] < second - WINDOW_S:
            self._recent.popleft()

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, of all answers together, over the last full seconds."""
        now = int(self.clock())
        recent = [tokens for second, tokens in self._recent if now - WINDOW_S <= second < now]
        return sum(recent) / WINDOW_S

    def refuse(self, task: str | None) -> None:
        """A request was refused since too much waits."""
        self.tasks.setdefault(task, TaskTally()).refused += 1

    def end(self, request: Request) -> None:
        """`request` has ended, one way or another."""
        task = self.tasks.setdefault(request.task, TaskTally())
        task.answered += request.finish_reason in ("stop", "length")
        task.cancelled += request.finish_reason == "cancelled"
        task.failed += request.finish_reason == "error"
        task.prompt_tokens += len(request.prompt)
        task.answer_tokens += len(request.token_ids)
        if request.deadline is not None and request.finish_reason in ("stop", "length"):
            task.deadlines_met += request.in_time
            task.deadlines_missed += not request.in_time
        for costs in (request.costs.prefill, request.costs.decode):
            task.routed_weight += costs.routed_weight
            task.degraded_weight += costs.degraded_weight
