"""What one client asked for, on its way between the loop and the engine's thread."""

import asyncio
import time
from dataclasses import dataclass, field

from retinue.engine.request import Request
from retinue.server.problem import Problem
from retinue.types import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step gave one answer of a call. The last one of an answer has a `finish`."""

    choice: int
    text: str
    tokens: int
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class Call:
    """What one client asked for: answers that are made together, and what came of them so far.

    `groups` hold the requests of each prompt. The first of a group runs alone until its prompt is
    computed, so that the others share that. `user` is the client's own mark, given back with the
    answer. Made, read and cancelled on the loop.
    """

    def __init__(self, groups: list[list[Request]], user: str | None = None) -> None:
        self.groups, self.user = groups, user
        self.requests = [request for group in groups for request in group]
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pieces: asyncio.Queue[Piece | Problem] = asyncio.Queue()
        self.began = time.perf_counter()
        self.held = 0  # answers that count for the room until it is over
        self.left = len(self.requests)
        self.cancelled = False
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        """End what still runs, as soon as its layer allows."""
        self.cancelled = True
        for request in self.requests:
            request.cancelled.set()


@dataclass(frozen=True, slots=True)
class Limits:
    """`room` answers may wait, run and be sent at once, each for `time_s` at most."""

    room: int
    time_s: float
