"""Which tokens run together, and when: prompts in chunks, then a token of each request at once.

As in `engine/scheduler.py`: requests start in the order of their arrival, at most `batch` run at
once, what is left of prompts goes first, and no pass takes more than `chunk` of their tokens.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retinue.policy.order.cohort import Cohort
from retinue.sim.recorded import Part, Recorded
from retinue.types import Phase


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come. `arrivals` [requests] are seconds; none: all are there at the start."""

    batch: int = 1
    chunk: int = 2048
    arrivals: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Pass:
    """The next pass: its parts, who begins with it, and how many requests could have decoded."""

    phase: Phase
    parts: list[Part]
    begun: list[int]
    ready: int


class Passes:
    """What runs when. `cohort` says how many of those that could decode do; None: all."""

    def __init__(self, requests: Sequence[Recorded], load: Load, cohort: Cohort | None) -> None:
        self._requests, self._load, self.cohort = requests, load, cohort
        self._waiting = deque(range(len(requests)))
        self._done: dict[int, int] = {}  # of those that run: tokens
        self._begun: list[int] = []

    def next(self, now: float, sleep: Callable[[float], None]) -> Pass | None:
        """The next pass, from `now` on; `sleep` is told until when nobody comes. None: the end."""
        self._admit(now)
        if not self._done:
            if not self._waiting:
                return None
            sleep(self._arrival(self._waiting[0]))
            self._admit(self._arrival(self._waiting[0]))
        begun, self._begun = self._begun, []
        parts = self._prompts()
        if parts:
            return Pass("prefill", parts, begun, 0)
        ready = list(self._done)
        size = self.cohort.size(len(ready)) if self.cohort is not None else len(ready)
        parts = [Part(each, self._done[each], self._done[each] + 1) for each in ready[:size]]
        return Pass("decode", parts, begun, len(ready))

    def ran(self, done: Pass) -> list[int]:
        """The pass is over; returns the requests that have ended with it."""
        ended = []
        for part in done.parts:
            self._done[part.request] = part.stop
            if part.stop == self._requests[part.request].tokens:
                del self._done[part.request]
                ended.append(part.request)
        return ended

    def _arrival(self, request: int) -> float:
        return self._load.arrivals[request] if self._load.arrivals else 0.0

    def _admit(self, now: float) -> None:
        waiting, batch = self._waiting, self._load.batch
        while waiting and len(self._done) < batch and self._arrival(waiting[0]) <= now:
            self._begun.append(waiting[0])
            self._done[waiting.popleft()] = 0

    def _prompts(self) -> list[Part]:
        parts, left = [], self._load.chunk
        for request, done in self._done.items():
            count = min(left, self._requests[request].prompt_tokens - done)
            if count > 0:
                parts.append(Part(request, done, done + count))
                left -= count
        return parts
