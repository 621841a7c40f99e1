"""A disk and a bus in numbers: reads that take their time on a simulated clock.

The queue is that of `memory/mover.py`: the most urgent read goes first, a chunk at a time, as many
chunks at once as keep the disk busy, or as there are reader threads, so that a demand waits for
chunks that have begun and for nothing else. A chunk waits for the disk to answer, then passes the
disk, and then the bus, where there is one; the reader of an expert in another precision then
expands its bits. Readers share the interpreter's lock with the engine: while that holds it, none of
them takes a chunk, nor says that one is there.
"""

import heapq
from collections import deque
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count

from retinue.errors import RetinueError
from retinue.memory.base import (
    CHUNK_BYTES,
    READERS,
    UNDER_WAY_BYTES,
    Sizes,
    Ticket,
    TicketState,
    Urgency,
)
from retinue.sim.disk import InTurn, Road, SideBySide
from retinue.types import Expert

# Of a disk's latency, as it is measured, what waking whoever waits takes; meanwhile others end too.
WAKE_S = 2e-5
Chunk = tuple["Read", int]  # with its size


@dataclass(frozen=True, slots=True)
class Roads:
    """How fast bytes come: from the disk, and over the bus to where they are computed with.

    `latency_s` is what the disk takes to answer a read. `bus_bytes_per_s` None: what is read is
    there. `in_turn`: reads pass the disk one after the other, as a limit lets them (see
    `Config.read_limit`), instead of side by side.
    """

    disk_bytes_per_s: float
    latency_s: float = 0.0
    bus_bytes_per_s: float | None = None
    in_turn: bool = False

    def disk(self) -> Road[Chunk]:
        """The disk, with nothing on its way."""
        return (InTurn if self.in_turn else SideBySide)(self.disk_bytes_per_s)

    def bus(self) -> Road[Chunk] | None:
        """The bus, if there is one."""
        return None if self.bus_bytes_per_s is None else InTurn(self.bus_bytes_per_s)

    def read_s(self, size: float) -> float:
        """What one read of `size` bytes takes, alone."""
        bus_s = 0.0 if self.bus_bytes_per_s is None else size / self.bus_bytes_per_s
        return self.latency_s + size / self.disk_bytes_per_s + bus_s


class Read:
    """A ticket: one expert's read."""

    __slots__ = (
        *("chunks", "error", "expand_s", "left", "running", "sequence", "settled", "state"),
        "urgency",
    )

    def __init__(
        self, chunks: int, left: int, urgency: Urgency, sequence: int, expand_s: float
    ) -> None:
        self.chunks, self.left = chunks, left  # to begin with: chunks, and bytes of them
        self.expand_s = expand_s  # what its last reader takes once all is there
        self.running = 0
        self.urgency, self.sequence = urgency, sequence
        self.state = TicketState.QUEUED
        self.settled = False
        self.error: RetinueError | None = None


class SimulatedLink:
    """Reads experts in no time of ours. `now` is its clock; `advance`, `hold` and `wait` move it.

    `start_s` is what whoever submits a read is busy with it, `expand_s` what a reader is busy with
    an expert of another precision, once it is read.
    """

    def __init__(
        self, roads: Roads, sizes: Sizes, start_s: float = 0.0, expand_s: float = 0.0
    ) -> None:
        self._roads, self._start_s, self._expand_s = roads, start_s, expand_s
        self._wake_s = min(WAKE_S, roads.latency_s)
        self._sizes: list[list[list[int]]] = sizes.read_bytes.tolist()
        self.now = 0.0
        self.bytes_read = self.reads = 0
        self._queue: list[tuple[int, int, Read]] = []
        self._idle, self._under_way = READERS, 0  # of the latter, bytes as they lie
        self._disk, self._bus = roads.disk(), roads.bus()
        self._expanding: deque[tuple[float, Chunk]] = deque()  # and when each will be done
        self._number = count()
        self._busy_s = self._busy_since = 0.0

    def together(self) -> AbstractContextManager[None]:
        """Nothing begins before time passes."""
        return nullcontext()

    def submit(self, expert: Expert, slot: int, urgency: Urgency, precision: int) -> Ticket:
        """Queue a read."""
        self.hold(self._start_s)
        size = self._sizes[precision][expert.layer][expert.index]
        expand_s = self._expand_s if precision else 0.0
        read = Read(-(-size // CHUNK_BYTES), size, urgency, next(self._number), expand_s)
        heapq.heappush(self._queue, (urgency, read.sequence, read))
        self.reads += 1
        return read

    def raise_urgency(self, ticket: Ticket, urgency: Urgency) -> None:
        """Move a queued read forward; its old place in the queue is skipped."""
        assert isinstance(ticket, Read)
        if urgency < ticket.urgency and ticket.state is TicketState.QUEUED:
            ticket.urgency = urgency
            if ticket.chunks:
                heapq.heappush(self._queue, (urgency, ticket.sequence, ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Begin no further chunk."""
        assert isinstance(ticket, Read)
        if ticket.state is TicketState.QUEUED:
            ticket.state = TicketState.CANCELLED
            ticket.settled = not ticket.running

    def wait(self, tickets: Collection[Ticket], timeout_s: float) -> float:
        """Let time pass until one of `tickets` settles, or the timeout."""
        started, limit = self.now, self.now + timeout_s
        for ticket in tickets:
            if ticket.settled:
                return 0.0
        if self._queue:
            self._begin()
        while (read := self._end(limit)) is not None:
            if read.settled and read in tickets:
                self.advance(self._wake_s)
                return self.now - started
        self.now = limit
        return timeout_s

    def clock(self) -> float:
        """Simulated seconds since the start."""
        return self.now

    def busy(self) -> float:
        """Of them those in which a chunk was under way."""
        return self._busy_s + (self.now - self._busy_since if self._idle < READERS else 0.0)

    def advance(self, seconds: float) -> None:
        """Let time pass, in which something else is done."""
        if self._idle == READERS and not self._queue:
            self.now += seconds  # nothing is under way
        else:
            self.advance_to(self.now + seconds)

    def advance_to(self, until: float) -> None:
        """The same, until `until`; nothing if that has passed."""
        if until <= self.now:
            return
        if self._queue:
            self._begin()
        while self._end(until) is not None:
            pass
        self.now = until

    def hold(self, seconds: float) -> None:
        """Let time pass in which readers get no turn: what was begun goes on, and nothing else."""
        self.now += seconds

    def _begin(self) -> None:
        """Let idle readers take the most urgent chunks."""
        queue, at = self._queue, self.now
        if self._idle == READERS:
            self._busy_since = at
        while self._idle and queue and self._under_way < UNDER_WAY_BYTES:
            urgency, _, read = queue[0]
            if not read.chunks or read.urgency != urgency or read.state is not TicketState.QUEUED:
                heapq.heappop(queue)
                continue
            size = min(read.left, CHUNK_BYTES)
            read.left -= size
            read.chunks -= 1
            read.running += 1
            self._idle -= 1
            self._under_way += size if not read.expand_s else 0
            self._disk.enter(at + self._roads.latency_s - self._wake_s, size, (read, size))

    def _through(self, limit: float) -> tuple[float, Chunk] | None:
        """The next chunk that is where it is needed, and when, if that is no later than `limit`."""
        disk, bus = self._disk, self._bus
        if bus is None:
            at = disk.due()
            return None if at > limit else (at, disk.leave())
        while True:
            at = disk.due()
            if (due := bus.due()) <= at:
                return (due, bus.leave()) if due <= limit else None
            if at > limit:
                return None
            chunk = disk.leave()
            bus.enter(at, chunk[1], chunk)

    def _expanded(self, limit: float) -> tuple[float, Chunk] | None:
        """The same, where some readers expand what they have read before they say so."""
        expanding = self._expanding
        while True:
            until = min(limit, expanding[0][0]) if expanding else limit
            found = self._through(until)
            if found is None:
                return expanding.popleft() if expanding and expanding[0][0] <= limit else None
            at, (read, size) = found
            last = read.running == 1 and not read.chunks
            if not (last and read.expand_s and read.state is TicketState.QUEUED):
                return found
            expanding.append((max(self.now, at) + read.expand_s, (read, size)))

    def _end(self, limit: float) -> Read | None:
        """The next chunk ends by `limit`, or has ended meanwhile; its reader takes another one."""
        found = self._through(limit) if not self._expand_s else self._expanded(limit)
        if found is None:
            return None
        ended, (read, size) = found
        if ended > self.now:
            self.now = ended
        self.bytes_read += size
        self._idle += 1
        self._under_way -= size if not read.expand_s else 0
        read.running -= 1
        if not read.running:
            if read.state is TicketState.QUEUED and not read.chunks:
                read.state = TicketState.DONE
            read.settled = read.state is not TicketState.QUEUED
        if self._idle == READERS:
            self._busy_s += self.now - self._busy_since
        if self._queue:
            self._begin()
        return read
