"""The thread that touches a tier's slots, beside an engine that takes and fills them."""

import ctypes
import os
import random
import sys
import threading
import time

import pytest

from retinue.memory.files import ALIGNMENT
from retinue.memory.tier import LATER, Tier

SLOTS, SLOT_BYTES = 64, 64 * ALIGNMENT


@pytest.mark.parametrize("threads", [1, 3])
def test_touching_loses_no_slot_and_overwrites_none(threads: int) -> None:
    tier = Tier(SLOTS, SLOT_BYTES)
    tier.touch(threads)
    held: dict[int, int] = {}
    source = random.Random(0)
    for _ in range(20 * SLOTS):
        assert tier.free == SLOTS - len(held)
        if held and (source.random() < 0.4 or not tier.free):
            slot = source.choice(list(held))
            assert tier.memory(slot)[0] == tier.memory(slot)[-1] == held.pop(slot)
            tier.give(slot)
            continue
        taken = tier.take()
        assert taken is not None
        assert taken not in held
        held[taken] = source.randrange(1, 256)
        tier.memory(taken)[:] = bytes([held[taken]]) * SLOT_BYTES
    while tier.free:
        slot = tier.take()
        assert slot is not None
        held[slot] = 0
    assert len(held) == SLOTS
    assert tier.take() is None
    tier.release()


def test_touching_ends_with_the_tier() -> None:
    tier = Tier(SLOTS, SLOT_BYTES)
    tier.touch(2)
    tier.release()
    assert len(tier._touchers) == 2
    assert not any(thread.is_alive() for thread in tier._touchers)
    tier.release()


def test_who_waits_helps_and_finds_every_slot_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    tier, touched = Tier(SLOTS, SLOT_BYTES), set[int]()
    tier.finish()
    assert tier.quick == SLOTS, "nobody touches them, and nobody waits"
    go, memset = threading.Event(), ctypes.memset

    def slow(address: int, value: int, count: int) -> int:
        if threading.current_thread() is threading.main_thread():
            touched.add(address)
            if len(touched) == SLOTS - 2:
                go.set()
        else:
            go.wait(20)  # as one that gets no core
        return memset(address, value, count)

    monkeypatch.setattr(ctypes, "memset", slow)
    tier.touch(2)
    while tier._touching < 2:
        time.sleep(0.001)
    tier.finish()
    assert len(touched) == SLOTS - 2
    assert tier.quick == tier.free == SLOTS
    tier.release()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_touching_stands_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tier, memset = Tier(1, SLOT_BYTES), ctypes.memset
    seen: list[int] = []

    def noting(address: int, value: int, count: int) -> int:
        seen.append(os.getpriority(os.PRIO_PROCESS, 0))  # of the thread that asks
        return memset(address, value, count)

    monkeypatch.setattr(ctypes, "memset", noting)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    tier.touch()
    tier._touchers[0].join()
    tier.release()
    assert seen == [max(own, LATER)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_slots_are_quick_once_they_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    tier, go, filled = Tier(3, SLOT_BYTES), threading.Semaphore(0), threading.Semaphore(0)
    assert tier.quick == 3, "without a thread none will ever be quicker than now"
    memset = ctypes.memset

    def slow(address: int, value: int, count: int) -> int:
        filled.release()
        go.acquire()
        return memset(address, value, count)

    monkeypatch.setattr(ctypes, "memset", slow)
    tier.touch()
    for touched in range(3):
        filled.acquire()
        assert (tier.quick, tier.free) == (touched, 3)
        go.release()
    tier.release()
    assert tier.quick == 3
