"""Which requests run, and what the next forward pass is for. Knows no tensors and no files.

Requests are admitted one at a time, when there are blocks for the whole of their prompt and their
longest answer: so none that runs is ever put back. Who is next, and which of prefill and decode,
says the order; nobody overtakes the one that it names, whatever room there is.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retinue.engine.blocks import BlockPool, Table
from retinue.errors import Overloaded
from retinue.metrics import PhaseCounters
from retinue.policy.order.base import Order, Queues
from retinue.policy.order.cohort import Cohort
from retinue.policy.order.fcfs import Fcfs
from retinue.types import Phase

if TYPE_CHECKING:
    from retinue.engine.request import Request
    from retinue.model.kv import Sequence

RETRY_S = 1.0  # to whom the queue is full


@dataclass(frozen=True, slots=True)
class Limits:
    """`batch` requests run at once, `queue` wait; a prefill pass has `chunk` tokens at most.

    `whole_prompts` says that a prompt cannot be cut, `sharing` that blocks of equal prefixes can be
    shared; without it a sequence can only be continued by the next one, whole.
    """

    context: int
    chunk: int
    batch: int
    whole_prompts: bool = False
    sharing: bool = True
    queue: int = 1024


@dataclass(frozen=True, slots=True)
class Parked:
    """A sequence whose request has ended, kept for a prompt that goes on from it."""

    tokens: list[int]
    sequence: "Sequence"
    table: Table


@dataclass(slots=True)
class Work:
    """The next pass: which requests, and how many of their tokens."""

    phase: Phase
    parts: list[tuple["Request", list[int]]] = field(default_factory=list)
    ready: int = 0  # requests that could have decoded


class Scheduler:
    """Keeps the waiting and the running requests and the blocks they own.

    `clock` gives seconds, and only ever more of them.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: Limits,
        cohort: Cohort,
        order: Order | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pool, self.limits, self.cohort = pool, limits, cohort
        self.order, self.clock = order or Fcfs(), clock
        self.waiting: list[Request] = []  # in the order of arrival
        self.running: list[Request] = []  # in the order of admission
        self.parked: list[Parked] = []  # the least recently used first
        self._last: Phase = "decode"

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: "Request") -> None:
        """Let `request` wait. Raises Overloaded if it would wait too long."""
        late_s = self.order.refuse(request, self.queues())
        if late_s is not None:
            raise Overloaded(
                f"too much waits: the first token would be {late_s:.1f} s late, or make others so",
                retry_after_s=late_s,
                hint=f"try again in {late_s:.1f} s, or allow the first token more time",
            )
        if len(self.waiting) >= self.limits.queue:
            raise Overloaded(
                f"too much waits: `{len(self.waiting)}` requests",
                retry_after_s=RETRY_S,
                hint="try again later, or use a larger `--queue`",
            )
        request.last_token_at = request.arrived
        self.waiting.append(request)

    def queues(self) -> Queues:
        """What the order is shown."""
        limits = self.limits
        return Queues(
            self.clock(),
            self.waiting,
            self.running,
            limits.batch,
            self.cohort.size(limits.batch),
            limits.chunk,
            limits.whole_prompts,
        )

    def admit(self) -> "Request | None":
        """The next request, with its blocks, if it may run now."""
        if not self.waiting or len(self.running) >= self.limits.batch:
            return None
        place = self.order.first(self.queues())
        if place is None:
            assert self.running, "the order keeps somebody waiting for nothing"
            return None
        if not self._seat(self.waiting[place]):
            return None
        request = self.waiting.pop(place)
        self.running.append(request)
        while self.parked and len(self.running) + len(self.parked) > self.limits.batch:
            self._unpark()  # states of parked sequences take the room of running ones
        return request

    def next(self) -> Work | None:
        """What the next pass is for; the order chooses where there is work of both kinds."""
        prompts = [request for request in self.running if not request.decoding]
        ready = [request for request in self.running if request.decoding]
        chunk = self.limits.chunk
        if prompts and ready:
            chunk = min(chunk, self.order.chunk(self.queues(), self._last))
        work = self._prefill(prompts, chunk)
        if not work.parts:
            work = self._decode(ready)
        self._last = work.phase
        return work if work.parts else None

    def passed(self, phase: Phase, cost: PhaseCounters, read: int, refreshed_s: float) -> None:
        """See what a pass has cost, and its new set: `read` bytes, waited for `refreshed_s`."""
        self.order.passed(phase, cost)
        if read:
            self.order.loaded(read, refreshed_s)

    def share(self, request: "Request") -> None:
        """Let others share what `request` has computed so far."""
        if self.limits.sharing and request.table is not None:
            self.pool.publish(request.table, request.tokens[: request.done])

    def leave(self, request: "Request", *, intact: bool) -> None:
        """`request` runs no more. `intact` says that its sequence holds what it should."""
        self.running.remove(request)
        table, sequence = request.table, request.sequence
        assert table is not None
        assert sequence is not None
        if intact:
            self.share(request)
        kept = not self.limits.sharing and not self.limits.whole_prompts
        if intact and request.done and request.reuse and kept:
            self.parked.append(Parked(request.tokens[: request.done], sequence, table))
        else:
            self.pool.give(table)
        request.table = request.sequence = None

    def check(self) -> None:
        """Assert that every block is accounted for."""
        tables = [request.table for request in self.running if request.table is not None]
        self.pool.check([*tables, *(parked.table for parked in self.parked)])

    def _seat(self, request: "Request") -> bool:
        """Give `request` room for its prompt and its longest answer, if there is any."""
        room = min(len(request.prompt) + request.params.max_new_tokens, self.limits.context)
        # What follows another prompt is a piece of a prompt.
        may = request.reuse and not self.limits.whole_prompts
        before = self._before(request) if may else None
        if before is not None and self.pool.extend(before.table, room):
            self.parked.remove(before)
            request.table, request.sequence = before.table, before.sequence
            request.sequence.grow(before.table.blocks)
            request.done = request.reused = len(before.tokens)
            return True
        reuse = may and self.limits.sharing
        while (table := self.pool.take(request.prompt, room, reuse=reuse)) is None:
            if not self.parked:
                return False
            self._unpark()
        request.table, request.done, request.reused = table, table.reused, table.reused
        return True

    def _before(self, request: "Request") -> Parked | None:
        """The longest parked sequence that `request` goes on from."""
        found, prompt = None, request.prompt
        for parked in self.parked:
            count, best = len(parked.tokens), len(found.tokens) if found else 0
            if best <= count < len(prompt) and prompt[:count] == parked.tokens:
                found = parked
        return found

    def _unpark(self) -> None:
        self.pool.give(self.parked.pop(0).table)

    def _prefill(self, prompts: "list[Request]", left: int) -> Work:
        work = Work("prefill")
        for place in self.order.rank(prompts, "prefill"):
            if left == 0:
                break
            request = prompts[place]
            rest = request.prompt[request.done :]
            if self.limits.whole_prompts and len(rest) > left:
                break  # a later pass begins with it
            work.parts.append((request, rest[:left]))
            left -= len(work.parts[-1][1])
        return work

    def _decode(self, ready: "list[Request]") -> Work:
        """The next token of the first of them; the others' turn comes when these end."""
        places = self.order.rank(ready, "decode")[: self.cohort.size(len(ready))]
        first = [ready[place] for place in places]
        return Work("decode", [(request, request.token_ids[-1:]) for request in first], len(ready))
