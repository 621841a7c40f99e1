"""How much the readers have under way at once: what keeps a disk busy, and no more."""

import errno
import threading
import time
from pathlib import Path

import pytest

from disk import PATIENCE_S, FakeDisk
from retinue.memory.base import UNDER_WAY_BYTES, Extent, Urgency
from retinue.memory.mover import Mover


@pytest.mark.parametrize(("size", "begin"), [(UNDER_WAY_BYTES // 2, 2), (UNDER_WAY_BYTES, 1)])
def test_no_chunk_begins_while_so_many_bytes_are_under_way(size: int, begin: int) -> None:
    disk = FakeDisk(held=True)
    mover = Mover(disk, readers=6, chunk_bytes=size)
    slots = [bytearray(size) for _ in range(5)]
    extents = [Extent(Path(str(at)), 0, size, size, 0, direct=True) for at in range(5)]
    with mover.together():
        tickets = [
            mover.submit([one], memoryview(slot), Urgency.DEMAND)
            for one, slot in zip(extents, slots, strict=True)
        ]
    disk.await_calls(begin)
    time.sleep(0.02)
    assert len(disk.calls) == begin
    for done in range(1, 6 - begin):
        disk.allow(1)
        disk.await_calls(begin + done)  # another one begins for each that ends
    time.sleep(0.02)
    assert sum(not ticket.settled for ticket in tickets) == begin
    disk.faults[extents[-1].file.name, 0] = OSError(errno.EIO, "broken")
    disk.allow()
    assert mover.wait(lambda: all(ticket.settled for ticket in tickets), PATIENCE_S)
    again = mover.submit([extents[0]], memoryview(slots[0]), Urgency.DEMAND)
    assert mover.wait(lambda: again.settled, PATIENCE_S), "one that failed is no longer under way"
    mover.close()


def test_a_reader_that_checks_what_it_read_keeps_no_disk_busy() -> None:
    disk, checking, go_on = FakeDisk(), threading.Event(), threading.Event()

    def check() -> None:
        checking.set()
        assert go_on.wait(PATIENCE_S)

    size = UNDER_WAY_BYTES
    mover = Mover(disk, readers=2, chunk_bytes=size)
    extents = [Extent(Path(str(at)), 0, size, size, 0, direct=True) for at in range(2)]
    first = mover.submit(extents[:1], memoryview(bytearray(size)), Urgency.DEMAND, check)
    assert checking.wait(PATIENCE_S)
    second = mover.submit(extents[1:], memoryview(bytearray(size)), Urgency.DEMAND)
    assert mover.wait(lambda: second.settled, PATIENCE_S)
    assert not first.settled
    go_on.set()
    assert mover.wait(lambda: first.settled, PATIENCE_S)
    mover.close()
