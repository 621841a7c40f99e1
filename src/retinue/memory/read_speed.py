"""How fast the mover brings experts from this disk: until one is there, and bytes a second.

A disk that reads large blocks at 2 GB/s may bring small experts at half of that, since each read
costs a thread's turn and a wait; and one that reads large experts into huge pages at 3 GB/s reads
them into small ones at 1.2. So they are read here as a layer reads those that it lacks, into slots.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from retinue.errors import ReadError
from retinue.memory.base import WAIT_S, Extent, TicketState, Urgency
from retinue.memory.files import ALIGNMENT, Reader
from retinue.memory.mover import Mover
from retinue.memory.tier import Tier

TOGETHER, MOST_BYTES = 8, 64 << 20  # reads at once, as far as they fit
ROUNDS, SECONDS = 3, 0.25  # at least so many rounds, and on until so long


@dataclass(frozen=True, slots=True)
class ReadSpeed:
    """What n reads of one size take together: `latency_s + n * size / bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def as_dict(self) -> dict[str, float]:
        """As documents of measurements name it."""
        return {"read_latency_s": self.latency_s, "reads_bytes_per_s": self.bytes_per_s}


def measure_reads(folder: Path, size: int, *, limit: float | None = None) -> ReadSpeed:
    """Measure reads of `size` bytes from the largest file of weights in `folder`.

    `limit` is that of `Config.read_limit`. Takes a quarter of a second, or what some reads take,
    and 64 MiB of memory, or room for two reads. Raises ReadError.
    """
    files = list(folder.glob("*.safetensors"))
    file = max(files, key=lambda each: each.stat().st_size, default=None)
    length = 0 if file is None else file.stat().st_size // ALIGNMENT * ALIGNMENT
    if file is None or not length:
        raise ReadError(f"nothing to read in `{folder}`", hint="check the folder")
    size = min(-(-size // ALIGNMENT) * ALIGNMENT, length)
    together = max(2, min(TOGETHER, MOST_BYTES // size))
    reader = Reader()
    mover = Mover(reader, bytes_per_s=limit)
    try:
        one_s, many_s = _Trial(mover, file, length, size, together).times()
    finally:
        mover.close()
        reader.close()
    each_s = max((many_s - one_s) / (together - 1), 1e-9)
    return ReadSpeed(max(0.0, one_s - each_s), size / each_s)


class _Trial:
    """Reads blocks of `size` bytes anywhere in `file`, `together` at once."""

    def __init__(self, mover: Mover, file: Path, length: int, size: int, together: int) -> None:
        self._mover, self._file, self._size = mover, file, size
        self._blocks = (length - size) // ALIGNMENT + 1
        self._random = random.Random(time.monotonic_ns())  # what was read before may be faster
        self._tier = Tier(together, size)
        self._rooms = [self._tier.memory(slot) for slot in range(together)]
        for room in self._rooms:
            room[:] = bytes(size)  # new pages are slow

    def times(self) -> tuple[float, float]:
        """Seconds until one alone is there, and until all of some at once are: medians."""
        one, many = list[float](), list[float]()
        until = time.perf_counter() + SECONDS
        while len(many) < ROUNDS or time.perf_counter() < until:
            one.append(self._read(1))
            many.append(self._read(len(self._rooms)))
        return median(one), median(many)

    def _read(self, count: int) -> float:
        starts = [ALIGNMENT * self._random.randrange(self._blocks) for _ in range(count)]
        began = time.perf_counter()
        waiting = [
            self._mover.submit([self._extent(start)], room, Urgency.DEMAND)
            for start, room in zip(starts, self._rooms, strict=False)
        ]
        while waiting:
            now = waiting  # as the engine waits: for any of them
            self._mover.wait(lambda now=now: any(each.settled for each in now), WAIT_S)  # type: ignore[misc]
            for ticket in waiting:
                if ticket.settled and ticket.state is not TicketState.DONE:
                    assert ticket.error is not None
                    raise ticket.error
            waiting = [ticket for ticket in waiting if not ticket.settled]
        return time.perf_counter() - began

    def _extent(self, start: int) -> Extent:
        stop = start + self._size
        return Extent(self._file, start, stop, stop, 0, direct=True)
