"""Brings the cache to where the books stand, while the pass runs that needs it.

After a new set, and should the last pass have failed. A layer waits for its own experts when it
is due, so that what later layers lack is read while earlier ones compute. What is waited for counts
as a stall, and with what else is done here as a part of the refresh.
"""

import time

from retinue.memory.attendance import Attendance
from retinue.memory.placing import place, start
from retinue.policy.base import BoolArray
from retinue.policy.miss.book import Books, Shares
from retinue.types import Expert


class Arrival:
    """The sets of one model: `books` say who is to serve, `attendance` reads and waits."""

    def __init__(self, attendance: Attendance, books: Books) -> None:
        self._attendance, self._cache, self._books = attendance, attendance.cache, books
        # Of the set that the running pass began to read, what its layers have not waited for yet.
        self._coming: dict[int, list[Expert]] | None = None

    def place(self, wanted: BoolArray, popularity: Shares) -> int:
        """Let exactly `wanted` [layers, experts] serve from the next pass on, which reads them.

        popularity: what is known of each one's share of routing weight; broadcasts to `wanted`.
        Returns the bytes that are lacking.
        """
        self._books.place(wanted, popularity)
        other: BoolArray = wanted != self._cache.ready
        self._books.astray = bool(other.any())
        return int(self._cache.sizes.read_bytes[0][other & wanted].sum())

    def settle(self) -> None:
        """Read now what the next pass would. Raises Cancelled, or the error of a read."""
        place(self._cache, self._books.there(), self._attendance.stop)
        self._books.astray = False

    def begin_pass(self) -> None:
        """A pass starts that keeps to the books. Raises Cancelled when nobody wants it any more."""
        if not self._books.astray:
            return
        started, coming = time.perf_counter(), dict[int, list[Expert]]()
        for expert in start(self._cache, self._books.there(), self._attendance.stop):
            coming.setdefault(expert.layer, []).append(expert)
        self._coming = coming
        self._count(started)

    def await_layer(self, layer: int) -> None:
        """Wait for what is coming to `layer`. Raises Cancelled, or the error of a read."""
        if not self._coming or layer not in self._coming:
            return
        cache, started = self._cache, time.perf_counter()
        coming, row = self._coming.pop(layer), cache.rows[layer]
        cache.poll()
        while lacking := [expert for expert in coming if row[expert.index] < 0]:
            awaited = {expert.index for expert in lacking}
            cache.reads.raise_failure(layer, awaited)
            cache.read(lacking)  # those whose failure was forgotten as another layer waited
            self._attendance.wait(layer, awaited)
        self._count(started)

    def end_pass(self, *, succeeded: bool) -> None:
        """The pass has ended. If it failed, the next one that keeps to the books begins anew."""
        if self._coming is not None and succeeded:
            self._books.astray = bool(self._cache.reads.loading)
        self._coming = None

    def _count(self, started: float) -> None:
        self._attendance.metrics.refresh_s += time.perf_counter() - started
