"""Who goes first: the questions that an order answers, and what it may see of requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from retinue.metrics import PhaseCounters
from retinue.types import Deadline, Phase


class Job(Protocol):
    """What an order may see of a request. Times are seconds on the engine's clock."""

    @property
    def task(self) -> str | None: ...
    @property
    def arrived(self) -> float: ...
    @property
    def deadline(self) -> Deadline | None: ...
    @property
    def prompt(self) -> Sequence[int]:
        """The ids of its prompt; empty where they are not known."""
        ...

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        ...

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest answer that was asked for."""
        ...

    @property
    def last_token_at(self) -> float:
        """When its last token came; its arrival before the first one."""
        ...


@dataclass(frozen=True, slots=True)
class Queues:
    """What waits and what runs, `now`. Read-only.

    `seats` requests run at once, `together` of them decode in one pass; a prefill pass takes
    `chunk` tokens, and cuts prompts unless they are `whole`.
    """

    now: float
    waiting: Sequence[Job]  # in the order of arrival
    running: Sequence[Job]  # in the order of admission
    seats: int
    together: int
    chunk: int
    whole: bool = False


class Order(Protocol):
    """Who goes first. The scheduler asks, and keeps to the room that there is.

    An order holds no requests: what waits and what runs is shown to it each time.
    """

    def refuse(self, job: Job, queues: Queues) -> float | None:
        """None: `job` may join those that wait. Else it would come too late: seconds until

        another try may be worth it.
        """
        ...

    def first(self, queues: Queues) -> int | None:
        """The place in `queues.waiting` of who shall run next; None: nobody yet.

        Asked while a seat is free and somebody waits. If nothing runs, it has to name one.
        """
        ...

    def rank(self, jobs: Sequence[Job], phase: Phase) -> list[int]:
        """Places in `jobs`, which are all in `phase`, in the order in which a pass takes them."""
        ...

    def chunk(self, queues: Queues, after: Phase) -> int:
        """How many tokens of prompts the next pass may take; 0: decode first.

        Asked where there is work of both kinds; `after` is what the last pass was for.
        """
        ...

    def passed(self, phase: Phase, cost: PhaseCounters) -> None:
        """See what a pass has cost."""
        ...

    def loaded(self, bytes_read: int, seconds: float) -> None:
        """See what changing the resident experts before a pass has cost."""
        ...

    def ended(self, job: Job) -> None:
        """See a request that was answered to its end."""
        ...
