"""A link whose reads are done at once, and slots that are mere numbers: for replays that count."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from retinue.errors import RetinueError
from retinue.memory.base import Sizes, Ticket, TicketState, Urgency
from retinue.types import Expert


class NumberedSlots:
    """`slots` slots without memory, all of them free."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots - 1, -1, -1))

    @property
    def free(self) -> int:
        """How many slots nobody holds."""
        return len(self._free)

    @property
    def quick(self) -> int:
        """All free ones: none costs more when first used."""
        return len(self._free)

    def take(self) -> int | None:
        """A free slot, or None."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Return `slot`, which was taken."""
        self._free.append(slot)


@dataclass(slots=True)
class DoneTicket:
    """A read that is done."""

    urgency: Urgency
    state: TicketState = TicketState.DONE
    error: RetinueError | None = None

    @property
    def settled(self) -> bool:
        """It is."""
        return True


class InstantLink:
    """Counts reads and their bytes; none takes any time."""

    def __init__(self, sizes: Sizes) -> None:
        self._bytes: list[list[list[int]]] = sizes.read_bytes.tolist()
        self.reads = self.bytes_read = 0

    def together(self) -> AbstractContextManager[None]:
        """Reads are done when they are queued."""
        return nullcontext()

    def submit(self, expert: Expert, slot: int, urgency: Urgency, precision: int) -> Ticket:
        """Read `expert`."""
        self.reads += 1
        self.bytes_read += self._bytes[precision][expert.layer][expert.index]
        return DoneTicket(urgency)

    def raise_urgency(self, ticket: Ticket, urgency: Urgency) -> None:
        """It is done already."""

    def cancel(self, ticket: Ticket) -> None:
        """It is done already."""

    def wait(self, tickets: Collection[Ticket], timeout_s: float) -> float:
        """No time passes."""
        return 0.0

    def clock(self) -> float:
        """No time passes."""
        return 0.0

    def busy(self) -> float:
        """No time passes."""
        return 0.0
