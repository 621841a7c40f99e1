"""The thread that touches a tier's slots, beside an engine that takes and fills them."""

import ctypes
import random
import threading

import pytest

from retinue.memory.files import ALIGNMENT
from retinue.memory.tier import Tier

SLOTS, SLOT_BYTES = 64, 64 * ALIGNMENT


def test_touching_loses_no_slot_and_overwrites_none() -> None:
    tier = Tier(SLOTS, SLOT_BYTES)
    tier.touch()
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
    tier.touch()
    tier.release()
    assert tier._toucher is not None
    assert not tier._toucher.is_alive()
    tier.release()


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
