"""What happens to an expert on its way into a slot, and what the mover makes of it."""

import threading
from pathlib import Path

import pytest

from disk import FakeDisk, eventually, pattern
from retinue.errors import CheckpointError
from retinue.memory.base import Extent, TicketState, Urgency
from retinue.memory.intake import stages_of
from retinue.memory.mover import Mover, Source

EXTENT = Extent(Path("f"), 0, 4 * 4096, 4 * 4096, 0, direct=True)


@pytest.fixture
def slot() -> memoryview:
    return memoryview(bytearray(4 * 4096))


def test_it_is_finished_once_after_the_last_chunk(slot: memoryview) -> None:
    disk, seen = FakeDisk(held=True), []
    mover = Mover(disk, readers=4, chunk_bytes=4096)
    ticket = mover.submit(
        [EXTENT], slot, Urgency.DEMAND, lambda: seen.append((bytes(slot), ticket.settled))
    )
    disk.await_calls(4)
    disk.allow(1)
    eventually(lambda: mover.bytes_read > 0)
    assert not seen  # though no chunk is left to begin
    disk.allow()
    eventually(lambda: ticket.settled)
    mover.close()
    assert seen == [(pattern("f", 0, 4 * 4096), False)]
    assert ticket.state is TicketState.DONE


def test_what_finishing_raises_fails_the_ticket(slot: memoryview) -> None:
    def wrong() -> None:
        raise CheckpointError("no")

    mover = Mover(FakeDisk(), readers=2, chunk_bytes=4096)
    ticket = mover.submit([EXTENT], slot, Urgency.DEMAND, wrong)
    eventually(lambda: ticket.settled)
    assert ticket.state is TicketState.FAILED
    assert str(ticket.error) == "no"
    mover.close()


def test_what_was_cancelled_or_failed_is_not_finished(slot: memoryview) -> None:
    disk, seen = FakeDisk(held=True), []
    mover = Mover(disk, readers=1, chunk_bytes=4096)
    cancelled = mover.submit([EXTENT], slot, Urgency.DEMAND, lambda: seen.append(1))
    disk.await_calls(1)
    mover.cancel(cancelled)
    disk.faults["g", 4096] = 7
    failed = mover.submit(
        [Extent(Path("g"), 0, 4 * 4096, 4 * 4096, 0, direct=True)],
        slot,
        Urgency.DEMAND,
        lambda: seen.append(2),
    )
    disk.allow()
    eventually(lambda: cancelled.settled and failed.settled)
    mover.close()
    assert (cancelled.state, failed.state) == (TicketState.CANCELLED, TicketState.FAILED)
    assert "truncated" in str(failed.error)
    assert not seen


def test_it_is_not_settled_while_it_is_being_finished(slot: memoryview) -> None:
    """Even when it is cancelled meanwhile: the slot is still looked at."""
    began, may_end = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        may_end.wait(20)

    mover = Mover(FakeDisk(), readers=2, chunk_bytes=4096)
    ticket = mover.submit([EXTENT], slot, Urgency.DEMAND, slow)
    assert began.wait(20)
    mover.cancel(ticket)
    assert not ticket.settled
    may_end.set()
    eventually(lambda: ticket.settled)
    mover.close()
    assert ticket.state is TicketState.CANCELLED


def test_a_task_reads_as_it_likes(slot: memoryview) -> None:
    def task(source: Source) -> int:
        return source.read(Path("h"), 0, slot[:100], direct=False)

    def broken(source: Source) -> int:
        raise ZeroDivisionError

    mover = Mover(FakeDisk(), readers=2)
    tickets = [mover.submit_task(each, Urgency.DEMAND) for each in (task, broken)]
    eventually(lambda: all(ticket.settled for ticket in tickets))
    mover.close()
    assert [ticket.state for ticket in tickets] == [TicketState.DONE, TicketState.FAILED]
    assert bytes(slot[:100]) == pattern("h", 0, 100)
    assert mover.bytes_read == 100
    assert "reading an expert failed" in str(tickets[1].error)


def test_large_experts_are_encoded_one_at_a_time() -> None:
    assert [stages_of(count << 20) for count in (1, 48, 49, 400)] == [2, 2, 1, 1]
