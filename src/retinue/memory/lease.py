"""Pins: what a running layer needs may not leave."""

from collections.abc import Iterable
from typing import Self

Pins = dict[int, int]  # how often each is pinned: layer * experts + expert


class Lease:
    """Pins on experts of one layer; each is released once, the rest when the `with` ends.

    `first` is the number in `pins` of the layer's expert 0.
    """

    __slots__ = ("_first", "_held", "_pins")

    def __init__(self, pins: Pins, first: int, experts: Iterable[int]) -> None:
        self._pins, self._first, self._held = pins, first, set(experts)
        for expert in self._held:
            pins[first + expert] = pins.get(first + expert, 0) + 1

    def release(self, experts: Iterable[int]) -> None:
        """`experts` have been computed and may leave."""
        pins, first = self._pins, self._first
        for expert in experts:
            self._held.remove(expert)
            left = pins[first + expert] - 1
            if left:
                pins[first + expert] = left
            else:
                del pins[first + expert]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release whatever is still held."""
        self.release(list(self._held))
