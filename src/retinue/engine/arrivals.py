"""Requests that arrive by chance, and how many of them are answered in time.

`poisson` draws them, `simulate` serves them through the real scheduler and order with passes that
cost what a cost model says, on a clock of its own, and `summary` says how it went, also of requests
that a real engine has served. Knows no tensors.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from retinue.engine.request import Request, State
from retinue.engine.scheduler import Scheduler, Work
from retinue.engine.text import TextStream
from retinue.errors import Overloaded
from retinue.metrics import PhaseCounters
from retinue.types import Deadline, SamplingParams


@dataclass(frozen=True, slots=True)
class Kind:
    """One task's requests: the means of their lengths in tokens, and what they are promised.

    Lengths are drawn evenly from half the mean to one and a half.
    """

    task: str
    prompt_tokens: float
    answer_tokens: float
    deadline: Deadline | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come, `at` seconds after the first second."""

    at: float
    kind: Kind
    prompt_tokens: int
    answer_tokens: int


def poisson(kinds: Sequence[Kind], rate: float, count: int, seed: int) -> list[Arrival]:
    """`count` requests of all `kinds` alike, `rate` a second; the same for the same seed."""
    chance, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += chance.expovariate(rate)
        kind = chance.choice(kinds)
        lengths = [
            max(1, round(mean * chance.uniform(0.5, 1.5)))
            for mean in (kind.prompt_tokens, kind.answer_tokens)
        ]
        found.append(Arrival(now, kind, *lengths))
    return found


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of simulated passes: each `base + tokens * slope`; and of changing experts.

    `loads` says how many experts each task has read when it runs and did not run just before.
    """

    prefill: tuple[float, float]
    decode: tuple[float, float]
    load: tuple[float, float] = (0.0, 0.0)
    loads: Mapping[str | None, int] = field(default_factory=dict)


class Clock:
    """Simulated seconds, for the scheduler that is given to `simulate`."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Now."""
        return self.now


class Simulation:
    """A scheduler on a simulated `clock`, whose passes cost what `costs` says."""

    def __init__(self, scheduler: Scheduler, clock: Clock, costs: Costs) -> None:
        self._scheduler, self._clock, self._costs = scheduler, clock, costs
        self.there: set[str | None] = set()  # tasks whose experts are loaded
        self.loaded = 0  # experts that were read

    def lacking(self, task: str | None) -> int:
        """How many experts a request of `task` would have read now."""
        return 0 if task in self.there else self._costs.loads.get(task, 0)

    def run(self, arrivals: Iterable[Arrival]) -> list[Request]:
        """Serve all `arrivals` to their ends; returns their requests in the same order."""
        coming = [(arrival, _request(arrival, self._clock.now)) for arrival in arrivals]
        coming.reverse()
        requests = [request for _, request in reversed(coming)]
        scheduler, clock = self._scheduler, self._clock
        while coming or scheduler.busy:
            if not scheduler.busy:
                clock.now = max(clock.now, coming[-1][1].arrived)
            while coming and coming[-1][1].arrived <= clock.now:
                self._add(coming.pop()[1])
            while (request := scheduler.admit()) is not None:
                request.state, request.sequence = State.PREFILL, NO_SEQUENCE
            work = scheduler.next()
            if work is not None:
                self._pass(work)
        scheduler.check()
        return requests

    def _add(self, request: Request) -> None:
        try:
            self._scheduler.add(request)
        except Overloaded as error:
            request.end(State.FAILED, "error", error)

    def _pass(self, work: Work) -> None:
        scheduler, clock = self._scheduler, self._clock
        loaded, loading_s = self._load()
        tokens = sum(len(part) for _, part in work.parts)
        prefill = work.phase == "prefill"
        base, slope = self._costs.prefill if prefill else self._costs.decode
        cost = PhaseCounters(passes=1, tokens=tokens, seconds=base + slope * tokens)
        clock.now += loading_s + cost.seconds
        scheduler.passed(work.phase, cost, loaded, loading_s)
        for request, part in work.parts:
            request.done += len(part)
            if request.done >= len(request.prompt):
                self._token(request)

    def _load(self) -> tuple[int, float]:
        """Read the experts of the tasks that run now and did not before: how many, how long."""
        tasks = {request.task for request in self._scheduler.running}
        count = sum(self._costs.loads.get(task, 0) for task in tasks - self.there)
        self.there = tasks
        self.loaded += count
        base, slope = self._costs.load
        return count, base + slope * count if count else 0.0

    def _token(self, request: Request) -> None:
        request.state = State.DECODE
        request.token_came(self._clock.now)
        request.token_ids.append(0)
        assert request.forced is not None
        if request.answered == len(request.forced):
            self._scheduler.leave(request, intact=False)
            request.end(State.DONE, "length")
            self._scheduler.order.ended(request)


NO_SEQUENCE: Any = object()
NO_SAMPLER: Any = None


def _request(arrival: Arrival, start: float) -> Request:
    """A request whose answer has as many tokens as drawn; the scheduler does not see how many."""
    kind = arrival.kind
    longest = max(arrival.answer_tokens, round(2 * kind.answer_tokens))
    return Request(
        [0] * arrival.prompt_tokens,
        SamplingParams(max_new_tokens=longest),
        NO_SAMPLER,
        TextStream(None, ()),
        forced=[0] * arrival.answer_tokens,
        task=kind.task,
        deadline=kind.deadline,
        arrived=start + arrival.at,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """How requests were served. Times are in seconds; those of requests that were refused are
    not among them, but they count as not in time."""

    requests: int
    in_time: int
    refused: int
    seconds: float  # from the first arrival to the last token
    first_token_p50_s: float
    first_token_p99_s: float
    latency_p50_s: float
    latency_p99_s: float
    worst_wait_s: float  # for a first token
    tasks: "Mapping[str, Summary]" = field(default_factory=dict)

    @property
    def attainment(self) -> float:
        """The share of all requests that met all of their deadlines."""
        return self.in_time / self.requests if self.requests else 1.0

    @property
    def goodput(self) -> float:
        """Requests a second that did."""
        return self.in_time / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-shaped, shares and rates included."""
        names = [name for name in self.__slots__ if name != "tasks"]
        flat = {name: getattr(self, name) for name in names}
        flat |= {"attainment": self.attainment, "goodput": self.goodput}
        return flat | {"tasks": {name: task.as_dict() for name, task in self.tasks.items()}}


def summary(requests: Sequence[Request]) -> Summary:
    """How `requests` were served, all together and by task."""
    begun = min((request.arrived for request in requests), default=0.0)
    ended = max((request.last_token_at for request in requests), default=0.0)
    names = Counter(request.task or "" for request in requests)
    tasks = {
        name: _summary([request for request in requests if (request.task or "") == name])
        for name in sorted(names)
    }
    tasks = {name: replace(task, seconds=ended - begun) for name, task in tasks.items()}
    return replace(_summary(requests), seconds=ended - begun, tasks=tasks)


def _summary(requests: Sequence[Request]) -> Summary:
    served = [request for request in requests if request.state is State.DONE]
    first = [request.first_token_s for request in served] or [0.0]
    whole = [request.last_token_at - request.arrived for request in served] or [0.0]
    return Summary(
        requests=len(requests),
        in_time=sum(request.in_time for request in served),
        refused=sum(isinstance(request.error, Overloaded) for request in requests),
        seconds=0.0,
        first_token_p50_s=float(np.percentile(first, 50)),
        first_token_p99_s=float(np.percentile(first, 99)),
        latency_p50_s=float(np.percentile(whole, 50)),
        latency_p99_s=float(np.percentile(whole, 99)),
        worst_wait_s=max(first),
    )
