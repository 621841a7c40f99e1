"""Pins: what a running layer needs may not leave."""

from collections.abc import Sequence
from typing import Self

from retinue.types import IntArray


class Lease:
    """Pins on experts of one layer; each is released once, the rest when the `with` ends."""

    __slots__ = ("_held", "_pins")

    def __init__(self, pins: IntArray, experts: IntArray) -> None:
        self._pins, self._held = pins, set(experts.tolist())
        pins[experts] += 1

    def release(self, experts: Sequence[int]) -> None:
        """`experts` have been computed and may leave."""
        for expert in experts:
            self._held.remove(expert)
        self._pins[experts] -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release whatever is still held."""
        self.release(list(self._held))
