"""A tier: one slab of equal slots, allocated once.

The slab is anonymous memory, aligned for direct reads. A page counts as resident from its first
touch, so a slot that was never filled costs nothing yet; the budget counts it all the same.
"""

import contextlib
import mmap
import sys

import torch

HUGE_PAGE_BYTES = 2 << 20


class Tier:
    """`slots` equal slots of `slot_bytes` each. Not thread-safe: the engine thread owns it."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        assert slots > 0, slots
        assert slot_bytes % mmap.PAGESIZE == 0, slot_bytes
        self.slots, self.slot_bytes = slots, slot_bytes
        self._map = _private_pages(slots * slot_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE") and slots * slot_bytes >= 8 * HUGE_PAGE_BYTES:
            # Fewer page-table entries for the kernels that stream through the slab.
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._memory = memoryview(self._map)
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        return len(self._free)

    def take(self) -> int | None:
        """A free slot, or None."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Return `slot`, which was taken."""
        assert slot not in self._free, slot
        self._free.append(slot)

    def tensor(self, slot: int) -> torch.Tensor:
        """The slot's bytes: uint8 `[slot_bytes]`."""
        start = slot * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]

    def memory(self, slot: int) -> memoryview:
        """The slot's bytes for a reader to write to."""
        start = slot * self.slot_bytes
        return self._memory[start : start + self.slot_bytes]

    @property
    def slab(self) -> torch.Tensor:
        """All slots' bytes, for measurements."""
        return self._bytes

    def release(self) -> None:
        """Give the pages back to the system. No view may be used afterwards."""
        with contextlib.suppress(OSError, AttributeError):
            self._map.madvise(mmap.MADV_DONTNEED)


def _private_pages(count: int) -> mmap.mmap:
    """Python's default are shared pages: those neither become huge nor go back in `release`."""
    if sys.platform == "win32":
        return mmap.mmap(-1, count)
    return mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
