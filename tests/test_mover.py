"""The readers' queue: who goes first, what a cancelled or failed read leaves, how it ends."""

import errno
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from disk import PATIENCE_S, FakeDisk, eventually, pattern
from retinue.errors import CheckpointError, ReadError, RetinueError
from retinue.memory import files
from retinue.memory.base import Extent, TicketState, Urgency
from retinue.memory.files import Reader
from retinue.memory.mover import Mover, Ticket

CHUNK = 4096


def extent(name: str, chunks: int, *, missing: int = 0) -> Extent:
    """A file of its own; its last `missing` bytes need not be there."""
    size = chunks * CHUNK
    return Extent(Path(name), 0, size, size - missing, 0, direct=True)


class Desk:
    """A mover over a fake disk, with a slot for each ticket."""

    def __init__(self, disk: FakeDisk, readers: int, bytes_per_s: float | None) -> None:
        self.disk = disk
        self.mover = Mover(disk, readers=readers, chunk_bytes=CHUNK, bytes_per_s=bytes_per_s)
        self.slots: dict[str, bytearray] = {}

    def submit(self, name: str, chunks: int, urgency: Urgency, *, missing: int = 0) -> Ticket:
        self.slots[name] = bytearray(chunks * CHUNK)
        one = extent(name, chunks, missing=missing)
        return self.mover.submit([one], memoryview(self.slots[name]), urgency)

    def finish(self, *tickets: Ticket) -> None:
        assert self.mover.wait(lambda: all(ticket.settled for ticket in tickets), PATIENCE_S)

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.disk.calls]

    def is_right(self, name: str) -> bool:
        return bytes(self.slots[name]) == pattern(name, 0, len(self.slots[name]))


@contextmanager
def desk(
    *, held: bool = False, readers: int = 1, bytes_per_s: float | None = None
) -> Iterator[Desk]:
    made = Desk(FakeDisk(held=held), readers, bytes_per_s)
    try:
        yield made
    finally:
        made.disk.allow()
        made.mover.close()


def test_extents_fill_the_slot_at_their_offsets() -> None:
    extents = [
        Extent(Path("a"), 8192, 20480, 20000, 0, direct=True),
        Extent(Path("b"), 77, 5077, 5077, 12288, direct=False),
    ]
    slot = bytearray(20480)
    with desk(readers=2) as work:
        ticket = work.mover.submit(extents, memoryview(slot), Urgency.DEMAND)
        work.finish(ticket)
        assert ticket.state is TicketState.DONE
        assert sorted(work.disk.calls) == [
            ("a", 8192),
            ("a", 12288),
            ("a", 16384),
            ("b", 77),
            ("b", 77 + CHUNK),
        ]
        assert work.mover.bytes_read == 12288 + 5000
    assert bytes(slot[:12288]) == pattern("a", 8192, 12288)
    assert bytes(slot[12288:17288]) == pattern("b", 77, 5000)
    assert not any(slot[17288:])


def test_what_is_submitted_together_begins_at_its_end_in_order_of_urgency() -> None:
    with desk() as work:
        with work.mover.together():
            tickets = [
                work.submit("later", 1, Urgency.LATER),
                work.submit("demand", 2, Urgency.DEMAND),
            ]
            time.sleep(0.02)
            assert not work.disk.calls
        work.finish(*tickets)
        assert work.order == ["demand", "demand", "later"]
        work.finish(work.submit("alone", 1, Urgency.DEMAND))


def test_what_is_submitted_together_before_an_error_is_read() -> None:
    with desk(readers=3) as work:
        tickets = []

        def fail() -> None:
            with work.mover.together():
                tickets.append(work.submit("a", 3, Urgency.DEMAND))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        work.finish(*tickets)
        assert work.is_right("a")


@pytest.mark.parametrize("readers", [1, 3])
def test_demand_waits_for_one_chunk_a_reader_at_most(readers: int) -> None:
    with desk(held=True, readers=readers) as work:
        ahead = work.submit("ahead", 12, Urgency.NEXT_LAYER)
        work.disk.await_calls(readers)
        demand = work.submit("demand", 4, Urgency.DEMAND)
        work.disk.allow()
        work.finish(ahead, demand)
        assert work.order[:readers] == ["ahead"] * readers
        # A reader that took the next chunk of `ahead` may get to the disk before the last one.
        last = max(at for at, name in enumerate(work.order) if name == "demand")
        assert last < readers + 4 + readers - 1
        assert (work.order.count("ahead"), work.order.count("demand")) == (12, 4)
        assert work.is_right("ahead")
        assert work.is_right("demand")


def test_order_is_urgency_then_arrival() -> None:
    with desk(held=True) as work:
        work.submit("first", 1, Urgency.LATER)
        work.disk.await_calls(1)
        names = {"l": Urgency.LATER, "n1": Urgency.NEXT_LAYER, "d1": Urgency.DEMAND}
        names |= {"n2": Urgency.NEXT_LAYER, "d2": Urgency.DEMAND}
        tickets = [work.submit(name, 1, urgency) for name, urgency in names.items()]
        work.disk.allow()
        work.finish(*tickets)
        assert work.order == ["first", "d1", "d2", "n1", "n2", "l"]


def test_raised_urgency_moves_forward_and_is_never_lowered() -> None:
    with desk(held=True) as work:
        work.submit("first", 1, Urgency.DEMAND)
        work.disk.await_calls(1)
        tickets = {name: work.submit(name, 2, Urgency.LATER) for name in "abc"}
        work.mover.raise_urgency(tickets["c"], Urgency.NEXT_LAYER)
        work.mover.raise_urgency(tickets["c"], Urgency.DEMAND)
        work.mover.raise_urgency(tickets["b"], Urgency.NEXT_LAYER)
        work.mover.raise_urgency(tickets["c"], Urgency.LATER)
        work.disk.allow()
        work.finish(*tickets.values())
        assert "".join(work.order[1:]) == "ccbbaa"
        work.mover.raise_urgency(tickets["a"], Urgency.DEMAND)  # too late, and no harm
        work.finish(work.submit("last", 1, Urgency.LATER))
        assert work.order[-1] == "last"


def test_cancelled_in_the_queue_is_never_read() -> None:
    with desk(held=True) as work:
        first = work.submit("first", 1, Urgency.DEMAND)
        work.disk.await_calls(1)
        ticket = work.submit("gone", 3, Urgency.DEMAND)
        assert not ticket.settled
        work.mover.cancel(ticket)
        assert ticket.settled
        assert ticket.state is TicketState.CANCELLED
        assert not ticket.started
        last = work.submit("last", 1, Urgency.LATER)
        work.disk.allow()
        work.finish(first, last)
        assert work.order == ["first", "last"]


def test_cancelled_in_mid_read_is_settled_after_the_running_chunk() -> None:
    with desk(held=True) as work:
        ticket = work.submit("gone", 3, Urgency.DEMAND)
        work.disk.await_calls(1)
        work.mover.cancel(ticket)
        assert ticket.started
        assert ticket.state is TicketState.CANCELLED
        assert not ticket.settled, "a reader still writes to the slot"
        assert not work.mover.wait(lambda: ticket.settled, 0.02)
        work.disk.allow()
        work.finish(ticket)
        work.finish(work.submit("last", 1, Urgency.LATER))
        assert work.order == ["gone", "last"]
        assert ticket.state is TicketState.CANCELLED
        work.mover.cancel(ticket)  # twice is no harm


def test_cancel_of_a_finished_read_changes_nothing() -> None:
    with desk() as work:
        ticket = work.submit("a", 2, Urgency.DEMAND)
        work.finish(ticket)
        work.mover.cancel(ticket)
        assert ticket.state is TicketState.DONE


@pytest.mark.parametrize("readers", [1, 3])
def test_failed_read_carries_its_error_and_stops(readers: int) -> None:
    error = ReadError("cannot read `a`", hint="check the disk")
    with desk(held=True, readers=readers) as work:
        work.disk.faults["a", CHUNK] = error
        ticket = work.submit("a", 40, Urgency.DEMAND)
        work.disk.allow()
        work.finish(ticket)
        assert ticket.state is TicketState.FAILED
        assert ticket.error is error
        fine = work.submit("b", 1, Urgency.DEMAND)
        work.finish(fine)
        assert fine.state is TicketState.DONE
        if readers == 1:
            assert work.disk.calls == [("a", 0), ("a", CHUNK), ("b", 0)]


def test_short_read_is_a_truncated_checkpoint() -> None:
    with desk() as work:
        work.disk.faults["a", CHUNK] = 100
        ticket = work.submit("a", 3, Urgency.DEMAND)
        work.finish(ticket)
        assert ticket.state is TicketState.FAILED
        assert isinstance(ticket.error, CheckpointError)
        assert "`a` is truncated: 100 bytes instead of 4096 at 4096" in str(ticket.error)
        assert "restore" in ticket.error.hint


@pytest.mark.parametrize(("got", "state"), [(96, TicketState.DONE), (95, TicketState.FAILED)])
def test_only_alignment_may_be_missing_at_the_end(got: int, state: TicketState) -> None:
    with desk() as work:
        work.disk.faults["a", CHUNK] = got
        ticket = work.submit("a", 2, Urgency.DEMAND, missing=4000)
        work.finish(ticket)
        assert ticket.state is state


@pytest.mark.parametrize("error", [ZeroDivisionError("odd"), AssertionError(), OSError(5, "I/O")])
def test_reader_thread_outlives_whatever_a_source_does(error: Exception) -> None:
    with desk() as work:
        work.disk.faults["a", 0] = error
        ticket = work.submit("a", 2, Urgency.DEMAND)
        work.finish(ticket)
        assert ticket.state is TicketState.FAILED
        assert type(ticket.error) is RetinueError
        assert "`a`" in str(ticket.error)
        assert repr(error) in str(ticket.error)
        work.finish(work.submit("b", 2, Urgency.DEMAND))
        assert work.is_right("b")


def test_close_cancels_what_is_queued_and_waits_for_what_runs() -> None:
    with desk(held=True) as work:
        running = work.submit("running", 3, Urgency.DEMAND)
        work.disk.await_calls(1)
        queued = work.submit("queued", 1, Urgency.DEMAND)
        closing = threading.Thread(target=work.mover.close)
        closing.start()
        eventually(lambda: queued.settled)
        assert queued.state is TicketState.CANCELLED
        assert not running.settled
        assert closing.is_alive()
        work.disk.allow()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert running.settled
        assert running.state is TicketState.CANCELLED
        assert work.order == ["running"]
        work.mover.close()
        with pytest.raises(AssertionError):
            work.submit("late", 1, Urgency.DEMAND)


def test_wait_times_out() -> None:
    with desk() as work:
        started = time.perf_counter()
        assert work.mover.wait(lambda: False, 0.05) is False
        assert 0.04 < time.perf_counter() - started < PATIENCE_S


def test_throttle_slows_down() -> None:
    """25 chunks of 4 KiB at 512 KiB/s take 0.2 s; without a limit, next to nothing."""
    for limit, least in ((None, 0.0), (512 << 10, 0.15)):
        with desk(readers=3, bytes_per_s=limit) as work:
            started = time.perf_counter()
            ticket = work.submit("a", 25, Urgency.DEMAND)
            work.finish(ticket)
            elapsed = time.perf_counter() - started
            assert elapsed >= least
            assert least <= work.mover.busy_s <= elapsed
            if limit is None:
                assert elapsed < 5


def test_busy_time_is_that_of_reads_alone() -> None:
    with desk(held=True, readers=2) as work:
        ticket = work.submit("a", 2, Urgency.DEMAND)
        work.disk.await_calls(2)
        time.sleep(0.05)
        work.disk.allow()
        work.finish(ticket)
        busy = work.mover.busy_s
        assert 0.04 < busy < PATIENCE_S
        time.sleep(0.02)
        assert work.mover.busy_s == busy


# --- real files


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_no_thread_and_no_file_is_left_behind(tmp_path: Path) -> None:
    gc.collect()
    threads, before = set(threading.enumerate()), open_files()
    names = [tmp_path / name for name in "abcd"]
    for name in names:
        name.write_bytes(pattern(name.name, 0, 2 * CHUNK))
    for _ in range(3):
        reader = Reader()
        mover = Mover(reader, readers=4, chunk_bytes=CHUNK)
        slots = [bytearray(2 * CHUNK) for _ in names]
        tickets = [
            mover.submit([Extent(name, 0, 8192, 8192, 0, direct=False)], memoryview(slot), 0)
            for name, slot in zip(names, slots, strict=True)
        ]
        assert mover.wait(lambda ts=tickets: all(t.settled for t in ts), PATIENCE_S)
        assert [bytes(slot) for slot in slots] == [name.read_bytes() for name in names]
        assert open_files() == before + 4
        assert len(set(threading.enumerate()) - threads) == 4
        mover.close()
        reader.close()
    assert open_files() == before
    assert set(threading.enumerate()) <= threads


@pytest.mark.skipif(not files.O_DIRECT, reason="no direct reads here")
def test_refused_direct_reads_are_buffered_and_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    file.write_bytes(pattern("f", 0, 5000))
    real = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    reader, into = Reader(), bytearray(8192)
    assert reader.note == ""
    assert reader.read(file, 0, memoryview(into), direct=True) == 5000
    assert bytes(into[:5000]) == file.read_bytes()
    assert "refuses direct reads" in reader.note
    assert str(tmp_path) in reader.note
    assert reader.read(file, 4096, memoryview(into), direct=True) == 904
    reader.close()


def test_missing_file_is_a_read_error(tmp_path: Path) -> None:
    reader = Reader()
    for direct in (True, False):
        with pytest.raises(ReadError, match=r"cannot read .*gone` at byte 512") as caught:
            reader.read(tmp_path / "gone", 512, memoryview(bytearray(10)), direct=direct)
        assert "disk" in caught.value.hint
    assert reader.note == "" or not files.O_DIRECT
    reader.close()


def test_error_in_mid_file_names_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(2000))
    results: list[int | OSError] = [700, OSError(errno.EIO, "Input/output error")]

    def part(*_: object) -> int:
        result = results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(files, "_pread", part)
    reader = Reader(direct=False)
    with pytest.raises(ReadError, match=r"f` at byte 100: Input/output error"):
        reader.read(file, 100, memoryview(bytearray(1900)), direct=False)
    reader.close()
    with pytest.raises(AssertionError, match="after close"):
        reader.read(file, 0, memoryview(bytearray(10)), direct=False)
