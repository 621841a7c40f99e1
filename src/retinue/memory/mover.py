"""Reads experts into slots: prioritised, cancellable, a chunk at a time, on threads of its own.

A ticket is one expert's read. Reader threads take the next chunk of the most urgent ticket, a few
at a time, so that a demand waits for no more of a prefetch than what keeps the disk busy. The mover
knows slots and files; it does not know why something is read, nor what else lies in memory.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from retinue.errors import CheckpointError, RetinueError
from retinue.memory.base import (
    CHUNK_BYTES,
    READERS,
    UNDER_WAY_BYTES,
    Extent,
    TicketState,
    Urgency,
)


class Source(Protocol):
    """What the mover reads from; `files.Reader`, or a test's faulty disk."""

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int: ...


# A part of a ticket's work: reads from the source, returns the bytes that it got.
Task = Callable[[Source], int]
Finish = Callable[[], None]


@dataclass(slots=True)
class _Chunk:
    file: Path
    offset: int
    into: memoryview
    needed: int  # fewer bytes than these mean that the file is truncated
    direct: bool

    def __call__(self, source: Source) -> int:
        got = source.read(self.file, self.offset, self.into, direct=self.direct)
        if got < self.needed:
            raise _truncated(self, got)
        return got


class Ticket:
    """One expert's read. Fields are written under the mover's lock.

    `finish` runs on a reader thread when the last chunk is read; what it raises fails the ticket.
    """

    __slots__ = (
        *("chunks", "error", "finish", "next", "running", "sequence", "state", "unread"),
        "urgency",
    )

    def __init__(
        self, chunks: Sequence[Task], urgency: Urgency, sequence: int, finish: Finish | None
    ) -> None:
        self.chunks, self.urgency, self.sequence = chunks, urgency, sequence
        self.finish = finish
        self.next = 0  # the chunk to start next
        self.running = 0  # chunks that a thread is reading
        self.unread = len(chunks)  # counted down for `finish` alone
        self.state = TicketState.QUEUED
        self.error: RetinueError | None = None

    @property
    def started(self) -> bool:
        """Whether a thread has taken its first chunk."""
        return self.next > 0

    @property
    def settled(self) -> bool:
        """Nothing more will be written to the slot."""
        return self.state is not TicketState.QUEUED and self.running == 0


class Mover:
    """The reader threads and their queue.

    `bytes_per_s` slows reads down to a slower disk's speed, for experiments and tests.
    """

    def __init__(
        self,
        source: Source,
        *,
        readers: int = READERS,
        chunk_bytes: int = CHUNK_BYTES,
        bytes_per_s: float | None = None,
    ) -> None:
        self._source, self._chunk_bytes = source, chunk_bytes
        self._throttle = _Throttle(bytes_per_s) if bytes_per_s else None
        lock = threading.RLock()
        # One for readers that wait for work, one for who waits for reads: waking a thread that has
        # nothing to do costs the engine a tenth of a millisecond.
        self._queued, self._changed = threading.Condition(lock), threading.Condition(lock)
        self._queue: list[tuple[int, int, Ticket]] = []
        self._sequence = itertools.count()
        self._waking: int | None = None  # readers to be woken when what is submitted is together
        self._closing = False
        self.bytes_read = 0
        self._busy_s, self._running, self._busy_since = 0.0, 0, 0.0
        self._under_way = 0  # bytes of the chunks that run
        self._threads = [
            threading.Thread(target=self._work, name=f"retinue-reader-{i}", daemon=True)
            for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def busy_s(self) -> float:
        """Seconds so far in which at least one read was running."""
        with self._changed:
            since = time.perf_counter() - self._busy_since if self._running else 0.0
            return self._busy_s + since

    def submit(
        self,
        extents: Sequence[Extent],
        slot: memoryview,
        urgency: Urgency,
        finish: Finish | None = None,
    ) -> Ticket:
        """Queue the reads of `extents` into `slot`, and then `finish`."""
        chunks = [chunk for extent in extents for chunk in self._split(extent, slot)]
        return self._queue_up(chunks, urgency, finish)

    def submit_task(self, task: Task, urgency: Urgency) -> Ticket:
        """Queue work that reads into memory of its own."""
        return self._queue_up([task], urgency)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is submitted within begins at its end, in one go.

        Readers would else take the lock, and the interpreter's, between any two submissions.
        """
        with self._changed:
            self._waking = 0
            try:
                yield
            finally:
                count, self._waking = self._waking, None
                self._wake(count)

    def _queue_up(
        self, chunks: Sequence[Task], urgency: Urgency, finish: Finish | None = None
    ) -> Ticket:
        with self._changed:
            assert not self._closing, "submit after close"
            ticket = Ticket(chunks, urgency, next(self._sequence), finish)
            heapq.heappush(self._queue, (urgency, ticket.sequence, ticket))
            if self._waking is None:
                self._wake(len(chunks))
            else:
                self._waking += len(chunks)
        return ticket

    def _wake(self, chunks: int) -> None:
        """Let as many readers as may begin take one of so many new chunks; they wake others."""
        if (left := UNDER_WAY_BYTES - self._under_way) > 0:
            self._queued.notify(min(chunks, -(-left // self._chunk_bytes)))

    def raise_urgency(self, ticket: Ticket, urgency: Urgency) -> None:
        """Move a queued ticket forward; its old place in the queue is skipped."""
        with self._changed:
            if urgency < ticket.urgency and ticket.state is TicketState.QUEUED:
                ticket.urgency = urgency
                if ticket.next < len(ticket.chunks):
                    heapq.heappush(self._queue, (urgency, ticket.sequence, ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Read no further chunk. The slot is free once `ticket.settled`."""
        with self._changed:
            if ticket.state is TicketState.QUEUED:
                ticket.state = TicketState.CANCELLED
                self._changed.notify_all()

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `ready()`, which looks at tickets, is true; False after the timeout."""
        with self._changed:
            return self._changed.wait_for(ready, timeout_s)

    def close(self) -> None:
        """Cancel what is queued and end the threads. Idempotent."""
        with self._changed:
            self._closing = True
            for _, _, ticket in self._queue:
                if ticket.state is TicketState.QUEUED:
                    ticket.state = TicketState.CANCELLED
            self._queue.clear()
            self._queued.notify_all()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _split(self, extent: Extent, slot: memoryview) -> list[_Chunk]:
        chunks = []
        for start in range(extent.start, extent.stop, self._chunk_bytes):
            stop = min(start + self._chunk_bytes, extent.stop)
            at = extent.offset + start - extent.start
            needed = min(stop, extent.needed_stop) - start
            into = slot[at : at + stop - start]
            chunks.append(_Chunk(extent.file, start, into, needed, extent.direct))
        return chunks

    def _work(self) -> None:
        while (job := self._next()) is not None:
            ticket, chunk = job
            got, error, size = 0, None, _size(chunk)
            try:
                started = time.perf_counter()
                got = chunk(self._source)
                if self._throttle is not None:
                    self._throttle.pay(got, started)
                if ticket.finish is not None:
                    last, size = self._was_last(ticket, size), 0
                    if last:
                        ticket.finish()
            except RetinueError as caught:
                error = caught
            except Exception as caught:  # a reader thread must outlive whatever a source does
                error = RetinueError(f"reading {_subject(chunk)} failed: {caught!r}")
            self._finish(ticket, size, got, error)

    def _was_last(self, ticket: Ticket, size: int) -> bool:
        """Whether the chunk of `size` that was read just now is the last of its ticket."""
        with self._changed:
            self._under_way -= size  # what follows does not keep the disk busy
            self._wake_next()
            ticket.unread -= 1
            return ticket.unread == 0 and ticket.state is TicketState.QUEUED

    def _next(self) -> tuple[Ticket, Task] | None:
        with self._changed:
            while True:
                if self._closing:
                    return None
                if (ticket := self._startable()) is not None:
                    break
                self._queued.wait()
            chunk = ticket.chunks[ticket.next]
            ticket.next += 1
            ticket.running += 1
            self._under_way += _size(chunk)
            self._wake_next()
            if self._running == 0:
                self._busy_since = time.perf_counter()
            self._running += 1
            return ticket, chunk

    def _wake_next(self) -> None:
        """Wake a reader if there is something for it: one that finds nothing costs us time."""
        if self._startable() is not None:
            self._queued.notify()

    def _startable(self) -> Ticket | None:
        """The ticket whose next chunk may begin now."""
        return self._most_urgent() if self._under_way < UNDER_WAY_BYTES else None

    def _most_urgent(self) -> Ticket | None:
        """The first ticket of the queue with a chunk to start; drops those without."""
        while self._queue:
            urgency, _, ticket = self._queue[0]
            live = ticket.state is TicketState.QUEUED and ticket.next < len(ticket.chunks)
            if live and urgency == ticket.urgency:
                return ticket
            heapq.heappop(self._queue)
        return None

    def _finish(self, ticket: Ticket, size: int, got: int, error: RetinueError | None) -> None:
        with self._changed:
            self.bytes_read += got
            self._under_way -= size
            ticket.running -= 1
            self._running -= 1
            if self._running == 0:
                self._busy_s += time.perf_counter() - self._busy_since
            if ticket.state is TicketState.QUEUED:
                if error is not None:
                    # The error first: others look at the state without the lock.
                    ticket.error, ticket.state = error, TicketState.FAILED
                elif ticket.next == len(ticket.chunks) and ticket.running == 0:
                    ticket.state = TicketState.DONE
            if ticket.settled:
                self._changed.notify_all()


class _Throttle:
    """Lets `bytes_per_s` bytes pass, all threads together."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s, self._lock, self._free_at = bytes_per_s, threading.Lock(), 0.0

    def pay(self, count: int, started: float) -> None:
        """Wait until the slower disk would have read `count` bytes, asked for at `started`."""
        with self._lock:
            start = max(self._free_at, started)
            self._free_at = start + count / self._bytes_per_s
            pause = self._free_at - time.perf_counter()
        if pause > 0:
            time.sleep(pause)


def _size(task: Task) -> int:
    """Bytes that it keeps the disk busy with; of work that reads a little and computes, none."""
    return len(task.into) if isinstance(task, _Chunk) else 0


def _subject(task: Task) -> str:
    return f"`{task.file}`" if isinstance(task, _Chunk) else "an expert"


def _truncated(chunk: _Chunk, got: int) -> RetinueError:
    return CheckpointError(
        f"`{chunk.file.name}` is truncated: {got} bytes instead of {chunk.needed}"
        f" at {chunk.offset}",
        hint="the file changed since it was opened; restore it",
    )
