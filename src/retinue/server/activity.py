"""What each expert was in the last moment of work: there, used, read, or missing.

One character an expert, so that a map of thousands of them is a few kilobytes of JSON.
"""

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from retinue.policy.base import BoolArray
from retinue.types import IntArray

LATELY_S = 0.25  # in a second, a fast model uses almost every expert
NONE = "-"  # this layer has no such expert
ABSENT, RESIDENT, HIT, READ, REPLACED, GONE = "012345"


class Activity:
    """Tells what happened lately from the passes in which it happened.

    there: [layers, experts], which experts the model has. exact: whether what is missing is read,
    instead of replaced by another expert.
    """

    def __init__(
        self, there: BoolArray, exact: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._there, self._exact, self._clock = there, exact, clock
        self._passes: deque[tuple[float, int]] = deque()  # (when, step), the first is long ago

    def rows(
        self, resident: BoolArray, last_used: IntArray, last_missed: IntArray, step: int
    ) -> list[str]:
        """A text for each layer; all arrays are [layers, experts], the last two hold steps.

        ABSENT, RESIDENT (and not used), HIT (there when it was asked for), READ (was not, and is
        now), GONE (was read and has left again), REPLACED (another expert served instead).
        """
        since = self._since(step)
        used, missed = last_used > since, last_missed > since
        found = np.full(resident.shape, ord(ABSENT), dtype=np.uint8)
        found[resident] = ord(RESIDENT)
        found[resident & used] = ord(HIT)
        found[resident & missed] = ord(READ)
        found[~resident & missed] = ord(GONE if self._exact else REPLACED)
        found[~self._there] = ord(NONE)
        return [row.tobytes().decode("ascii") for row in found]

    def _since(self, step: int) -> int:
        """The last step that was done LATELY_S ago."""
        now = self._clock()
        while len(self._passes) > 1 and self._passes[1][0] <= now - LATELY_S:
            self._passes.popleft()
        self._passes.append((now, step))
        return self._passes[0][1]
