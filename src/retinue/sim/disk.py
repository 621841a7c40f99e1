"""What passes a disk or a bus in numbers: side by side, or one after the other.

Requests to a real disk are served side by side, so that those that begin together end together. A
limit on reads, and a bus, let them pass in turn. Times of arrival may lie in the future; nothing
else is known of time here.
"""

import heapq
from collections import deque
from math import inf
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")


class Road(Protocol[Item]):
    """Where items pass. `due` is when the next one is through; `leave` takes that one out."""

    def enter(self, at: float, size: int, item: Item) -> None:
        """`size` bytes arrive at `at`, which is no earlier than any before."""
        ...

    def due(self) -> float:
        """When the next one is through, as far as is known; infinity: nothing is on its way."""
        ...

    def leave(self) -> Item:
        """The one that is through next."""
        ...


class InTurn(Generic[Item]):
    """One after the other, in the order in which they arrive."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._free_at = bytes_per_s, 0.0
        self._ends: deque[tuple[float, Item]] = deque()

    def enter(self, at: float, size: int, item: Item) -> None:
        """Begins when all before are through."""
        self._free_at = max(self._free_at, at) + size / self._rate
        self._ends.append((self._free_at, item))

    def due(self) -> float:
        """When the first is through."""
        return self._ends[0][0] if self._ends else inf

    def leave(self) -> Item:
        """The first."""
        return self._ends.popleft()[1]


class SideBySide(Generic[Item]):
    """All at once, each as fast as any other.

    `_served` is what each of those that passed since the start got, in bytes: who arrives when that
    is v, with s bytes, is through when it is v + s.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._at, self._served = bytes_per_s, 0.0, 0.0
        self._coming: deque[tuple[float, int, Item]] = deque()
        self._passing: list[tuple[float, int, Item]] = []
        self._number = 0

    def enter(self, at: float, size: int, item: Item) -> None:
        """Takes its share from `at` on."""
        self._coming.append((at, size, item))

    def due(self) -> float:
        """When the first is through, if nothing else arrives."""
        while True:
            end = inf
            if self._passing:
                left = self._passing[0][0] - self._served
                end = self._at + left * len(self._passing) / self._rate
            if not self._coming or self._coming[0][0] > end:
                return end
            self._join()

    def leave(self) -> Item:
        """The one that is through first."""
        self._advance(self.due())
        return heapq.heappop(self._passing)[2]

    def _join(self) -> None:
        at, size, item = self._coming.popleft()
        self._advance(at)
        self._number += 1
        heapq.heappush(self._passing, (self._served + size, self._number, item))

    def _advance(self, until: float) -> None:
        if until > self._at:
            if self._passing:
                self._served += (until - self._at) * self._rate / len(self._passing)
            self._at = until
