"""The last numbers of a stream, in order of size: quantiles of what was seen of late."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class Window:
    """The last `size` numbers. One more costs a search, where sorting them all anew costs all."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: deque[float] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._seen)

    def extend(self, numbers: Iterable[float]) -> None:
        """These come last; what is more than `size` before them is forgotten."""
        for number in numbers:
            self._seen.append(number)
            insort(self._ordered, number)
            if len(self._seen) > self._size:
                gone = self._seen.popleft()
                del self._ordered[bisect_left(self._ordered, gone)]

    def between(self, place: float) -> tuple[float, float, float]:
        """The numbers below and above `place`, from 0 to 1 in order of size, and how far between.

        There has to be one. The last is from 0, at the lower one, to 1.
        """
        at = place * (len(self._ordered) - 1)
        low = int(at)
        high = min(low + 1, len(self._ordered) - 1)
        return self._ordered[low], self._ordered[high], at - low
