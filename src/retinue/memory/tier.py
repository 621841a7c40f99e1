"""A tier: one slab of equal slots, allocated once.

The slab is anonymous memory, aligned for direct reads. Its pages become resident with their first
touch, which costs: readers that meet one page fault after the other read at half the disk's speed
and take the cores that compute. So threads touch the slots that nobody has taken yet, from a time
when torch has not even been imported, and leave their cores to whoever computes.
"""

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HUGE_PAGE_BYTES = 2 << 20
LATER = 10  # how nice those threads are: they get a tenth of a core that others want


class Tier:
    """`slots` equal slots of `slot_bytes` each. But for its own threads, the engine's owns it.

    `more` slots have addresses and no memory, until `grow` adds some of them.
    """

    def __init__(self, slots: int, slot_bytes: int, more: int = 0) -> None:
        assert slots > 0, slots
        assert slot_bytes % mmap.PAGESIZE == 0, slot_bytes
        self.slots, self.slot_bytes = slots, slot_bytes
        self._map = _private_pages((slots + more) * slot_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE") and slots * slot_bytes >= 8 * HUGE_PAGE_BYTES:
            # Fewer page-table entries for the kernels that stream through the slab.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._memory = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._free: list[int] = []
        self._fresh = list(range(slots - 1, -1, -1))  # free, and never taken
        self._more = list(range(slots + more - 1, slots - 1, -1))
        self._held = bytearray(slots + more)  # which of them somebody holds
        self._touched = threading.Condition()
        self._alone = True  # nobody else looks, so that nothing has to be locked
        self._touching = 0  # free slots that threads have in hand
        self._touchers: list[threading.Thread] = []

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        if self._alone:
            return len(self._free) + len(self._fresh)
        with self._touched:
            return len(self._free) + len(self._fresh) + self._touching

    @property
    def quick(self) -> int:
        """How many free slots have been touched, or count as such since nobody touches any."""
        if self._alone:
            return len(self._free) + len(self._fresh)
        with self._touched:
            return len(self._free)

    @property
    def untouched(self) -> int:
        """How many slots may not be in memory yet."""
        with self._touched:
            return len(self._fresh) + self._touching

    @property
    def more(self) -> int:
        """How many slots `grow` could add."""
        return len(self._more)

    def take(self) -> int | None:
        """A free slot, or None. May wait some milliseconds for one that is being touched."""
        if self._alone:
            return self._pop()
        with self._touched:
            self._touched.wait_for(lambda: self._free or self._fresh or not self._touching)
            return self._pop()

    def _pop(self) -> int | None:
        slots = self._free or self._fresh
        if not slots:
            return None
        self._held[slots[-1]] = True
        return slots.pop()

    def give(self, slot: int) -> None:
        """Return `slot`, which was taken."""
        assert self._held[slot], slot
        self._held[slot] = False
        if self._alone:
            self._free.append(slot)
            return
        with self._touched:
            self._free.append(slot)

    def grow(self, count: int) -> None:
        """Add `count` slots, of `more` at most, which a thread touches from now on."""
        with self._touched:
            self._fresh += [self._more.pop() for _ in range(count)]
            self.slots += count
        self.touch()

    def shrink(self, count: int) -> int:
        """Give the memory of up to `count` free slots back; `grow` may add them again.

        Returns how many there were.
        """
        gone = 0
        with self._touched:
            while gone < count:
                self._touched.wait_for(lambda: self._fresh or self._free or not self._touching)
                if not (slots := self._fresh or self._free):
                    break
                slot = slots.pop()
                self._map.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)
                self._more.append(slot)
                gone += 1
            self.slots -= gone
        return gone

    def touch(self, threads: int = 1) -> None:
        """Make the pages of fresh slots resident from now on, in threads, until `release`.

        They write instead of asking for pages with `madvise`, which would hold up every other
        mapping of the process for as long.
        """
        self._touchers = [thread for thread in self._touchers if thread.is_alive()]
        self._alone = False
        for number in range(threads):
            name = f"retinue-touch-{number}"
            thread = threading.Thread(target=self._touch_aside, name=name, daemon=True)
            self._touchers.append(thread)
            thread.start()

    def finish(self) -> None:
        """Touch what the threads have not touched yet, if there are any, and wait for them."""
        if self._touchers:
            self._touch()
        for thread in self._touchers:
            thread.join()

    def _touch_aside(self) -> None:
        if sys.platform == "linux":  # elsewhere a thread has no priority of its own
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LATER)
        self._touch()

    def _touch(self) -> None:
        while True:
            with self._touched:
                if not self._fresh:
                    self._alone = self._alone or not self._touching
                    return
                slot = self._fresh.pop()
                self._touching += 1
            # Without the interpreter's lock, as for every foreign function.
            ctypes.memset(self._address + slot * self.slot_bytes, 0, self.slot_bytes)
            with self._touched:
                self._free.insert(0, slot)  # the first ones touched are taken first
                self._touching -= 1
                self._touched.notify_all()

    def tensor(self, slot: int) -> "torch.Tensor":
        """The slot's bytes: uint8 `[slot_bytes]`."""
        start = slot * self.slot_bytes
        return self.slab[start : start + self.slot_bytes]

    def memory(self, slot: int) -> memoryview:
        """The slot's bytes for a reader to write to."""
        start = slot * self.slot_bytes
        return self._memory[start : start + self.slot_bytes]

    @cached_property
    def slab(self) -> "torch.Tensor":
        """All slots' bytes: uint8."""
        import torch

        return torch.frombuffer(self._map, dtype=torch.uint8)

    def release(self) -> None:
        """Give the pages back to the system. No view may be used afterwards. Idempotent."""
        with self._touched:
            self._fresh.clear()
        self.finish()
        with contextlib.suppress(OSError, AttributeError):
            self._map.madvise(mmap.MADV_DONTNEED)


def _private_pages(count: int) -> mmap.mmap:
    """Python's default are shared pages: those neither become huge nor go back in `release`."""
    if sys.platform == "win32":
        return mmap.mmap(-1, count)
    return mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
