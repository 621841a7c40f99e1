"""Between the clients, on an asyncio loop, and the engine, on a thread of its own.

The thread owns the model and everything that belongs to it, from loading to closing. Calls go to it
through a queue, and what a step gave comes back by `call_soon_threadsafe`. All that the loop may do
to a request that runs is to set its `cancelled`.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from retinue.engine.request import Request, State
from retinue.errors import RetinueError
from retinue.server.call import Call, Limits, Piece
from retinue.server.problem import STOPPING, Problem, problem_of

LATE = "time_limit"

log = logging.getLogger("retinue.server")


class Engine(Protocol):
    """What the bridge needs of the engine; `engine.engine.Engine`, or a test's."""

    @property
    def busy(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Request]: ...

    def end_cancelled(self) -> list[Request]: ...

    def idle(self) -> None: ...


class Model(Protocol):
    """A loaded model as the bridge sees it: it is opened, served and closed on the thread."""

    @property
    def engine(self) -> Engine: ...

    def stepped(self, moved: list[Request]) -> None:
        """Told after every step, and when nothing is left to do."""
        ...

    def close(self) -> None: ...


Served = TypeVar("Served", bound=Model)


class Listener(Protocol):
    """Told on the loop what happens, for metrics."""

    def piece(self, call: Call, piece: Piece, now: float) -> None: ...


@dataclass(slots=True)
class _Seat:
    """Where what a request gives goes."""

    call: Call
    choice: int
    siblings: list[Request]
    sent: int = 0


class Bridge(Generic[Served]):
    """Runs one model for any number of calls. `ready` is told of it when it is loaded.

    `phase` is `loading`, `ready`, `stopping` or `failed`; then `failure` says why.
    """

    def __init__(
        self,
        load: Callable[[], Served],
        limits: Limits,
        listener: Listener,
        ready: Callable[[Served], None] = lambda model: None,
    ) -> None:
        self._load, self._limits, self._listener, self._ready = load, limits, listener, ready
        self._inbox: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._seats: dict[Request, _Seat] = {}
        self._thread = threading.Thread(target=self._run, name="engine")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving = False
        self._model: Served | None = None
        self.phase = "loading"
        self.failure: BaseException | None = None
        self.under_way = 0  # answers that wait and run, counted on the loop
        self.held = 0  # those, and what slow clients have yet to read
        self.ended = asyncio.Event()
        self.quiet = asyncio.Event()  # set while no answer is under way
        self.quiet.set()

    # --- on the loop

    def start(self) -> None:
        """Begin to load, and to serve then."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, call: Call) -> None:
        """Hand `call` over, and wait until the engine has taken it.

        Raises Problem where it is refused.
        """
        if self.phase != "ready":
            raise self.unready()
        if len(call.requests) > self._limits.room:
            text = f"asks for {len(call.requests)} answers, this server takes {self._limits.room}"
            raise Problem(400, text, code="too_many_answers")
        if self.held + len(call.requests) > self._limits.room:
            text = f"{self.held} answers wait, run and are being sent: the queue is full"
            raise Problem(429, text, code="queue_full", retry_after_s=1)
        self.under_way += call.left
        call.held = call.left
        self.held += call.held
        self.quiet.clear()
        assert self._loop is not None
        call.timer = self._loop.call_later(self._limits.time_s, self._expire, call)
        self._inbox.put(call)
        await call.accepted

    def _expire(self, call: Call) -> None:
        late = Problem(408, f"the request took longer than {self._limits.time_s:g} s", code=LATE)
        self._accept(call, late)
        call.pieces.put_nowait(late)
        call.cancel()
        self._inbox.put(None)

    def cancel(self, call: Call) -> None:
        """The client has left or has it all, or its time is over. Idempotent."""
        self.held -= call.held
        call.held = 0
        if call.timer is not None:
            call.timer.cancel()
        if call.left and not call.cancelled:
            call.cancel()
            self._inbox.put(None)

    @property
    def loading(self) -> bool:
        """Whether the thread is there and has no model yet. Nothing can end it then."""
        return self._model is None and self._thread.is_alive()

    @property
    def model(self) -> Served:
        """The model. Raises Problem while nothing is taken."""
        if self._model is None or self.phase != "ready":
            raise self.unready()
        return self._model

    def unready(self) -> Problem:
        """Why nothing is taken now."""
        if self.phase == "loading":
            return Problem(503, "the model is loading", code="loading", retry_after_s=1)
        if self.phase == "failed":
            return Problem(503, "the engine has failed; the log says why", code="failed")
        return Problem(503, STOPPING, code="stopping", retry_after_s=10)

    async def drain(self, grace_s: float) -> None:
        """Take nothing new; refuse what waits, let what runs end within `grace_s`, end the rest.

        While the model loads this is the end: `loading` then says that the thread is still at it.
        """
        if self.phase == "loading":
            self.ended.set()
        if self.phase in ("ready", "loading"):
            self.phase = "stopping"
        self._inbox.put(None)
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self.quiet.wait()
        self.leave()

    def leave(self) -> None:
        """End everything now."""
        self._leaving = True
        self._inbox.put(None)

    def _loaded(self, model: Served) -> None:
        self._model = model
        self._ready(model)
        if self.phase == "loading":
            self.phase = "ready"

    def _failed(self, error: BaseException) -> None:
        self.phase, self.failure = "failed", error
        self._refuse_inbox(_failed())  # what came after the thread had looked

    def _accept(self, call: Call, problem: Problem | None) -> None:
        if call.accepted.done():
            return
        if problem is None:
            call.accepted.set_result(None)
        else:
            call.accepted.set_exception(problem)

    def _hand_out(self, given: list[tuple[Call, Piece | Problem]]) -> None:
        now = time.perf_counter()
        for call, piece in given:
            if isinstance(piece, Piece):
                self._listener.piece(call, piece, now)
                if piece.finish is not None:
                    self._gone(call, 1)
            call.pieces.put_nowait(piece)

    def _gone(self, call: Call, count: int) -> None:
        call.left -= count
        self.under_way -= count
        assert self.under_way >= 0
        assert call.left >= 0
        if not self.under_way:
            self.quiet.set()

    # --- on the thread

    def _run(self) -> None:
        try:
            model = self._load()
        except BaseException as error:
            self._fail(error)
            return
        try:
            model.stepped([])
            self._tell(self._loaded, model)
            while self._serve(model):
                pass
        except BaseException as error:
            log.exception("the engine failed")
            self._fail(error)
        finally:
            model.close()
            self._tell(self.ended.set)

    def _fail(self, error: BaseException) -> None:
        self._refuse_all(_failed())
        self._tell(self._failed, error)
        self._tell(self.ended.set)

    def _serve(self, model: Served) -> bool:
        """Take what came, make one step; False when it is time to go."""
        engine = model.engine
        self._take(engine)
        if self._leaving:
            self._refuse_all(Problem(503, STOPPING, code="stopping"))
            self._forget(engine)
            return False
        if self.phase == "stopping":
            self._refuse_waiting()
        try:
            moved = engine.step()
        except Exception as error:  # a fault of ours: it must not end the server
            log.exception("a step failed")
            self._refuse_all(problem_of(error))
            self._forget(engine)
            return True
        self._deliver(engine, moved)
        model.stepped(moved)
        return True

    def _take(self, engine: Engine) -> None:
        """Add the calls that came; wait for one where there is nothing to do."""
        if not engine.busy and self._inbox.empty():
            engine.idle()
        call = None if engine.busy else self._inbox.get()
        while True:
            if call is not None:
                self._add(engine, call)
            try:
                call = self._inbox.get_nowait()
            except queue.Empty:
                return

    def _add(self, engine: Engine, call: Call) -> None:
        choice = 0
        try:
            for group in call.groups:
                engine.add(group[0])
                self._seats[group[0]] = _Seat(call, choice, group[1:])
                choice += len(group)
        except RetinueError as error:
            for request in call.requests:
                request.cancelled.set()
                self._seats.pop(request, None)
            self._tell(self._accept, call, problem_of(error))
            self._tell(self._gone, call, len(call.requests))
        else:
            self._tell(self._accept, call, None)

    def _deliver(self, engine: Engine, moved: list[Request]) -> None:
        given: list[tuple[Call, Piece | Problem]] = []
        for request in moved:
            seat = self._seats.get(request)
            if seat is None:
                continue
            piece = _piece(request, seat)
            if request.state is State.FAILED and request.error is not None:
                given.append((seat.call, problem_of(request.error)))
            if piece is not None:
                given.append((seat.call, piece))
            if seat.siblings and (request.decoding or request.state.final):
                given += self._add_siblings(engine, seat)
            if request.state.final:
                del self._seats[request]
        if given:
            self._tell(self._hand_out, given)

    def _add_siblings(self, engine: Engine, seat: _Seat) -> list[tuple[Call, Piece | Problem]]:
        """The prompt is computed: now the others may share it."""
        refused: list[tuple[Call, Piece | Problem]] = []
        for place, request in enumerate(seat.siblings, seat.choice + 1):
            if seat.call.cancelled:
                refused.append((seat.call, Piece(place, "", 0, finish="cancelled")))
                continue
            try:
                engine.add(request)
            except RetinueError as error:
                refused.append((seat.call, problem_of(error)))
                refused.append((seat.call, Piece(place, "", 0, finish="error")))
            else:
                self._seats[request] = _Seat(seat.call, place, [])
        seat.siblings = []
        return refused

    def _refuse_waiting(self) -> None:
        """The server stops: calls of which nothing has begun are refused."""
        calls = {seat.call for seat in self._seats.values() if not seat.call.cancelled}
        for call in calls:
            if all(request.state is State.WAITING for request in call.requests):
                call.cancel()
                refusal = Problem(503, STOPPING, code="stopping", retry_after_s=10)
                self._tell(self._hand_out, [(call, refusal)])

    def _refuse_all(self, problem: Problem) -> None:
        """Every call that is not done gets `problem`."""
        for request, seat in self._seats.items():
            request.cancelled.set()
            last: list[Piece | Problem] = [problem, Piece(seat.choice, "", 0, finish="error")]
            places = range(seat.choice + 1, seat.choice + 1 + len(seat.siblings))
            last += [Piece(place, "", 0, finish="error") for place in places]
            self._tell(self._hand_out, [(seat.call, piece) for piece in last])
        self._seats.clear()
        self._refuse_inbox(problem)

    def _refuse_inbox(self, problem: Problem) -> None:
        while not self._inbox.empty():
            if (call := self._inbox.get()) is not None:
                self._tell(self._accept, call, problem)
                self._tell(self._gone, call, len(call.requests))

    def _forget(self, engine: Engine) -> None:
        """Everything is cancelled: the books have to balance without it."""
        engine.end_cancelled()
        engine.idle()

    def _tell(self, function: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has gone: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *arguments)


def _failed() -> Problem:
    return Problem(500, "the engine has failed", code="failed")


def _piece(request: Request, seat: _Seat) -> Piece | None:
    """What is new of `request`; None for nothing."""
    text, count = request.take_delta(), len(request.token_ids)
    new, finish = count - seat.sent, request.finish_reason
    if not (text or new or finish):
        return None
    logprobs = request.logprobs[seat.sent : count]
    seat.sent = count
    return Piece(seat.choice, text, new, logprobs, finish)
