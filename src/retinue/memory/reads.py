"""The reads that are under way: for whom, into which slot, and which of them failed.

What a cancelled read has begun is still written, so its slot drains before anybody gets it.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from retinue.errors import RetinueError
from retinue.memory.base import Link, Ticket, TicketState, Urgency
from retinue.types import Expert, IntArray

Reason = Literal["prefill", "decode", "refresh"]  # what experts are read for
REASONS: tuple[Reason, ...] = ("prefill", "decode", "refresh")


class Reads:
    """Reads through `link`. Slots come from the cache and go back to it."""

    def __init__(self, link: Link, layers: int) -> None:
        self.link = link
        self.reason: Reason = "prefill"  # of those that end now
        self._counts = {reason: [[0, 0] for _ in range(layers)] for reason in REASONS}
        self.loading: dict[Expert, tuple[Ticket, int]] = {}
        self.draining: list[tuple[Ticket, int]] = []
        self._placing = False
        self._of_sets: set[Expert] = set()  # of those under way
        self.started = 0  # so far, those that were cancelled included
        self.busy = 1.0  # the share of decoding's time in which the link reads, lately
        self._failed: dict[Expert, RetinueError] = {}

    @property
    def counts(self) -> dict[Reason, IntArray]:
        """By reason [layers, 2]: experts that were read to the end, and their bytes."""
        return {reason: np.array(rows) for reason, rows in self._counts.items()}

    @property
    def ahead(self) -> int:
        """How many of them nobody has asked for yet."""
        return len([0 for ticket, _ in self.loading.values() if ticket.urgency > 0])

    def start(self, key: Expert, slot: int, urgency: Urgency, precision: int) -> None:
        """Read `key` into `slot`."""
        self.started += 1
        self._failed.pop(key, None)
        if self._placing:
            self._of_sets.add(key)
        else:
            self._of_sets.discard(key)  # of a read that was cancelled
        self.loading[key] = (self.link.submit(key, slot, urgency, precision), slot)

    @contextmanager
    def placing(self) -> Iterator[None]:
        """What is started within counts as read for a new set, whenever it ends."""
        self._placing = True
        try:
            yield
        finally:
            self._placing = False

    def count(self, key: Expert, read_bytes: int) -> bool:
        """`key` was read to the end; returns whether that was for a new set."""
        of_set = key in self._of_sets
        self._of_sets.discard(key)
        counts = self._counts["refresh" if of_set else self.reason][key.layer]
        counts[0] += 1
        counts[1] += read_bytes
        return of_set

    def hurry(self, key: Expert, urgency: Urgency) -> None:
        """Move the read of `key`, which is under way, to the front."""
        self.link.raise_urgency(self.loading[key][0], urgency)

    def settled(self) -> list[tuple[Expert, int, bool]]:
        """Those that ended since this was asked last: who, where, and whether it was read."""
        ended = [key for key, (ticket, _) in self.loading.items() if ticket.settled]
        found: list[tuple[Expert, int, bool]] = []
        for key in ended:
            ticket, slot = self.loading.pop(key)
            found.append((key, slot, ticket.state is TicketState.DONE))
            if ticket.error is not None:
                self._failed[key] = ticket.error
        return found

    def drained(self) -> list[int]:
        """Slots that nothing is written to any more."""
        done = [entry for entry in self.draining if entry[0].settled]
        for entry in done:
            self.draining.remove(entry)
        return [slot for _, slot in done]

    def cancel(self, chosen: Callable[[Expert, Ticket], bool]) -> list[tuple[Expert, int | None]]:
        """Cancel the `chosen`; returns who, and the slot unless it has to drain first."""
        cancelled: list[tuple[Expert, int | None]] = []
        for key in [key for key, (ticket, _) in self.loading.items() if chosen(key, ticket)]:
            ticket, slot = self.loading.pop(key)
            self.link.cancel(ticket)
            if not ticket.settled:
                self.draining.append((ticket, slot))
            cancelled.append((key, slot if ticket.settled else None))
        return cancelled

    def wait(self, timeout_s: float) -> float:
        """Wait until some read settles, or the timeout. Returns the seconds that passed."""
        tickets = [ticket for ticket, _ in self.loading.values()]
        if self.draining:
            tickets += [ticket for ticket, _ in self.draining]
        assert tickets, "nothing to wait for: a layer needs more slots than there are"
        return self.link.wait(tickets, timeout_s)

    def forget_failures(self) -> None:
        """Nobody asks for them any more."""
        self._failed.clear()

    def raise_any(self) -> None:
        """Raise the error of some read that failed, if one did."""
        if self._failed:
            raise self._failed.popitem()[1]

    def raise_failure(self, layer: int, needed: Collection[int]) -> None:
        """Raise the error of a read that failed for `needed` of `layer`; others are forgotten."""
        if not self._failed:
            return
        wanted = {Expert(layer, index) for index in needed}
        failed = [error for key, error in self._failed.items() if key in wanted]
        self._failed.clear()
        if failed:
            raise failed[0]
