"""The link between disk and slots: an expert's files, read by the mover into a tier.

It knows how experts are laid out, and nothing of why they are read.
"""

import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from retinue.memory import mover as moving
from retinue.memory.base import Sizes, Ticket, Urgency
from retinue.memory.intake import Intake
from retinue.memory.layout import Block, ExpertLayout
from retinue.memory.mover import Mover
from retinue.memory.nested_store import NestedStore
from retinue.memory.tier import Tier
from retinue.types import Expert

Layouts = Sequence[Sequence[ExpertLayout]]
Views = dict[str, tuple[Block, ...]]


@dataclass(frozen=True, slots=True)
class Nested:
    """The store of other precisions, with the names that a policy has for them.

    names: those of a `Precision`, the first one the checkpoint's own.
    """

    store: NestedStore
    names: Sequence[str]

    def task(self, expert: Expert, precision: int, slot: torch.Tensor) -> moving.Task:
        """What reads `expert` into `slot` in `names[precision]`."""
        return self.store.task(expert, self.names[precision], slot)


class DiskLink:
    """Reads the experts of `layouts` into `tier`, and shows them there.

    `layouts[layer]` is empty for layers without routed experts. Precisions other than the
    checkpoint's own are those of `nested`. Belongs to the engine's thread.
    """

    def __init__(
        self, layouts: Layouts, tier: Tier, mover: Mover, nested: Nested | None = None
    ) -> None:
        self._layouts, self._tier, self.mover, self._nested = layouts, tier, mover, nested
        self._intake = Intake(layouts)
        self._views: dict[int, tuple[Expert, Views]] = {}  # by slot

    def together(self) -> AbstractContextManager[None]:
        """Within, reads are queued that begin at its end."""
        return self.mover.together()

    def submit(self, expert: Expert, slot: int, urgency: Urgency, precision: int) -> Ticket:
        """Queue the read of `expert` into `slot`; `precision` 0 is the checkpoint's own."""
        if precision:
            assert self._nested is not None, precision
            task = self._nested.task(expert, precision, self._tier.tensor(slot))
            return self.mover.submit_task(task, urgency)
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

    def busy(self) -> float:
        """Seconds so far in which the mover read something."""
        return self.mover.busy_s

    @property
    def expand_s(self) -> float | None:
        """What an expert of another precision took after its bytes were there, on average."""
        return None if self._nested is None else self._nested.store.decode_s

    def views(self, layer: int, expert: int, slot: int) -> Views:
        """The parameters of the expert that is READY in `slot`."""
        key = Expert(layer, expert)
        known = self._views.get(slot)
        if known is None or known[0] != key:  # native kernels need addresses alone: most never ask
            shown = self._layouts[layer][expert].views(self._tier.tensor(slot))
            known = self._views[slot] = (key, shown)
        return known[1]


def sizes_of(layouts: Layouts, nested: Nested | None = None) -> Sizes:
    """The sizes of experts as they are in the files, then in the other precisions."""
    names = ("",) if nested is None else nested.names
    shape = (len(names), len(layouts), max(len(row) for row in layouts))
    read, used = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for layer, row in enumerate(layouts):
        read[0, layer, : len(row)] = [layout.read_bytes for layout in row]
        used[0, layer, : len(row)] = [layout.used_bytes for layout in row]
        for index, name in enumerate(names[1:], start=1):
            assert nested is not None
            read[index, layer, : len(row)] = nested.store.read_bytes(layer, name)
            used[index, layer, : len(row)] = nested.store.used_bytes(layer, name)
    return Sizes(read, used)
