"""What the cache needs of the world: slots to fill, a link that fills them, and sizes as arrays.

Both are there twice: memory and a disk (`memory/tier.py`, `memory/link.py`), and numbers on a
simulated clock. Nothing here imports torch.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Protocol

import numpy as np

from retinue.errors import RetinueError
from retinue.policy.base import BoolArray
from retinue.types import Expert, IntArray

WAIT_S = 0.1  # how often who waits for reads looks whether they are still wanted
CHUNK_BYTES = 2 << 20  # a read is cut into these, and
READERS = 6  # so many are read at once, at most
# None begins while so many bytes are under way, which keep a disk busy. Reads that it serves side
# by side end together: the more there are, the later comes the first, for which a layer waits.
UNDER_WAY_BYTES = 5 << 19


class Urgency(IntEnum):
    """Smaller goes first."""

    DEMAND = 0
    NEXT_LAYER = 1
    LATER = 2


class TicketState(Enum):
    """QUEUED until all is read, or one of the ends."""

    QUEUED = "queued"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Extent:
    """One read: `[start, stop)` of `file` goes to `offset` in the slot.

    `direct` says that start, stop and offset are aligned, and that a direct read may be used;
    bytes from `needed_stop` on are alignment, which the end of a file may lack.
    """

    file: Path
    start: int
    stop: int
    needed_stop: int
    offset: int
    direct: bool


class Ticket(Protocol):
    """One expert's read. Only its link changes it."""

    urgency: Urgency
    state: TicketState
    error: RetinueError | None  # why it is FAILED

    @property
    def settled(self) -> bool:
        """Whether nothing more will be written to the slot."""
        ...


class Slots(Protocol):
    """Equal places for experts: `memory.tier.Tier`, or numbers."""

    slots: int

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        ...

    @property
    def quick(self) -> int:
        """How many of these can be written at once; the others cost time when first used."""
        ...

    def take(self) -> int | None:
        """A free slot, or None."""
        ...

    def give(self, slot: int) -> None:
        """Return `slot`, which was taken."""
        ...


class Link(Protocol):
    """Reads experts into slots: `memory.link.DiskLink`, or a simulation."""

    def together(self) -> AbstractContextManager[None]:
        """Within, reads are queued that may begin as late as at its end."""
        ...

    def submit(self, expert: Expert, slot: int, urgency: Urgency, precision: int) -> Ticket:
        """Queue the read of `expert` into `slot`; `precision` is an index as in `Precision`."""
        ...

    def raise_urgency(self, ticket: Ticket, urgency: Urgency) -> None:
        """Move a queued read forward."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Read no more than what has begun. The slot is free once `ticket.settled`."""
        ...

    def wait(self, tickets: Collection[Ticket], timeout_s: float) -> float:
        """Wait until one of `tickets` settles, or the timeout. Returns the seconds that passed."""
        ...

    def clock(self) -> float:
        """Seconds since some time in the past, on the clock that reads take their time on."""
        ...

    def busy(self) -> float:
        """Seconds so far in which at least one read was under way."""
        ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes by precision, layer and expert, `[precisions, layers, experts]`; 0: no such expert.

    `read_bytes` is what a read moves, `used_bytes` what of it are weights.
    """

    read_bytes: IntArray
    used_bytes: IntArray

    @property
    def there(self) -> BoolArray:
        """Which experts there are: `[layers, experts]`."""
        return np.asarray(self.used_bytes[0] > 0)
