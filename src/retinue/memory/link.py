"""The link between disk and slots: an expert's files, read by the mover into a tier.

It knows how experts are laid out, and nothing of why they are read.
"""

import time
from collections.abc import Collection, Sequence
from typing import cast

import numpy as np

from retinue.memory import mover as moving
from retinue.memory.base import Sizes, Ticket, Urgency
from retinue.memory.intake import Intake
from retinue.memory.layout import Block, ExpertLayout
from retinue.memory.mover import Mover
from retinue.memory.tier import Tier
from retinue.types import Expert

Layouts = Sequence[Sequence[ExpertLayout]]
Views = dict[str, tuple[Block, ...]]


class DiskLink:
    """Reads the experts of `layouts` into `tier`, and shows them there.

    `layouts[layer]` is empty for layers without routed experts. Belongs to the engine's thread.
    """

    def __init__(self, layouts: Layouts, tier: Tier, mover: Mover) -> None:
        self._layouts, self._tier, self.mover = layouts, tier, mover
        self._intake = Intake(layouts)
        self._views: dict[int, tuple[Expert, Views]] = {}  # by slot

    def submit(self, expert: Expert, slot: int, urgency: Urgency, precision: int) -> Ticket:
        """Queue the read of `expert` into `slot`, in the checkpoint's own precision."""
        assert precision == 0, precision
        layout = self._layouts[expert.layer][expert.index]
        return self._intake.submit(self.mover, expert, layout, self._tier, slot, urgency)

    def raise_urgency(self, ticket: Ticket, urgency: Urgency) -> None:
        """Move a queued read forward."""
        self.mover.raise_urgency(cast(moving.Ticket, ticket), urgency)

    def cancel(self, ticket: Ticket) -> None:
        """Read no more than what has begun."""
        self.mover.cancel(cast(moving.Ticket, ticket))

    def wait(self, tickets: Collection[Ticket], timeout_s: float) -> float:
        """Wait until one of `tickets` settles, or the timeout. Returns the seconds that passed."""
        started = time.perf_counter()
        self.mover.wait(lambda: any(ticket.settled for ticket in tickets), timeout_s)
        return time.perf_counter() - started

    def clock(self) -> float:
        """Seconds since some time in the past."""
        return time.perf_counter()

    def views(self, layer: int, expert: int, slot: int) -> Views:
        """The parameters of the expert that is READY in `slot`."""
        key = Expert(layer, expert)
        known = self._views.get(slot)
        if known is None or known[0] != key:  # native kernels need addresses alone: most never ask
            shown = self._layouts[layer][expert].views(self._tier.tensor(slot))
            known = self._views[slot] = (key, shown)
        return known[1]


def sizes_of(layouts: Layouts) -> Sizes:
    """The sizes of experts as they are in the files, in one precision."""
    shape = (1, len(layouts), max(len(row) for row in layouts))
    read, used = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for layer, row in enumerate(layouts):
        read[0, layer, : len(row)] = [layout.read_bytes for layout in row]
        used[0, layer, : len(row)] = [layout.used_bytes for layout in row]
    return Sizes(read, used)
