"""Numbers for the requests that run, as small as can be, so that arrays may have a row for each."""

from typing import Any

import numpy as np
import numpy.typing as npt

from retinue.types import IntArray


class Seats:
    """A request takes the lowest free seat and gives it back when it ends."""

    def __init__(self) -> None:
        self._seats: dict[int, int] = {}
        self._free: list[int] = []  # in descending order

    def take(self, sequence: int) -> int:
        """The seat of a request that begins; its own if it has one."""
        if sequence not in self._seats:
            self._seats[sequence] = self._free.pop() if self._free else len(self._seats)
        return self._seats[sequence]

    def leave(self, sequence: int) -> int | None:
        """Free the seat of a request that ends; None if it had none."""
        seat = self._seats.pop(sequence, None)
        if seat is not None:
            self._free = sorted([*self._free, seat], reverse=True)
        return seat

    def of(self, sequences: IntArray) -> IntArray:
        """The seat of each: `[tokens]`; -1 for those that never began."""
        if len(sequences) == 1:
            return np.array([self._seats.get(int(sequences[0]), -1)])
        return np.array([self._seats.get(number, -1) for number in sequences.tolist()], np.int64)


def grown(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """`array` with room for at least `rows`, those that are new are 0."""
    if len(array) >= rows:
        return array
    more = np.zeros((max(rows, 2 * len(array)) - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, more])
