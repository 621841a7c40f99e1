"""Which requests run, and what the next forward pass is for. Knows no tensors and no files.

Requests are admitted in the order of arrival, when there are blocks for the whole of their prompt
and their longest answer: so none that runs is ever put back, and each one's turn comes. Prefill
and decode passes alternate while there is work for both.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from retinue.engine.blocks import BlockPool, Table
from retinue.engine.cohort import Cohort
from retinue.types import Phase

if TYPE_CHECKING:
    from retinue.engine.request import Request
    from retinue.model.kv import Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """`batch` requests run at once; a prefill pass has `chunk` tokens at most.

    `whole_prompts` says that a prompt cannot be cut, `sharing` that blocks of equal prefixes can be
    shared; without it a sequence can only be continued by the next one, whole.
    """

    context: int
    chunk: int
    batch: int
    whole_prompts: bool = False
    sharing: bool = True


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
    """Keeps the waiting and the running requests and the blocks they own."""

    def __init__(self, pool: BlockPool, limits: Limits, cohort: Cohort) -> None:
        self.pool, self.limits, self.cohort = pool, limits, cohort
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.parked: list[Parked] = []  # the least recently used first
        self._last: Phase = "decode"

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def admit(self) -> "Request | None":
        """The next request, with its blocks, if it may run now."""
        if not self.waiting or len(self.running) >= self.limits.batch:
            return None
        if not self._seat(self.waiting[0]):
            return None
        request = self.waiting.popleft()
        self.running.append(request)
        while self.parked and len(self.running) + len(self.parked) > self.limits.batch:
            self._unpark()  # states of parked sequences take the room of running ones
        return request

    def next(self) -> Work | None:
        """What the next pass is for; the phases take turns."""
        prefill, decode = self._prefill(), self._decode()
        if prefill.parts and decode.parts:
            work = decode if self._last == "prefill" else prefill
        else:
            work = prefill if prefill.parts else decode
        self._last = work.phase
        return work if work.parts else None

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

    def _prefill(self) -> Work:
        work, left = Work("prefill"), self.limits.chunk
        for request in self.running:
            if request.decoding or left == 0:
                continue
            rest = request.prompt[request.done :]
            if self.limits.whole_prompts and len(rest) > left:
                break  # a later pass begins with it
            work.parts.append((request, rest[:left]))
            left -= len(work.parts[-1][1])
        return work

    def _decode(self) -> Work:
        """The next token of those that arrived first; the others' turn comes when these end."""
        ready = [request for request in self.running if request.decoding]
        first = ready[: self.cohort.size(len(ready))]
        return Work("decode", [(request, request.token_ids[-1:]) for request in first], len(ready))
