"""Sends what a call gives, whole or as a stream of events, while the client is there."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi.responses import JSONResponse, Response

from retinue.server.answer import Envelope, Json, Shape, ours, usage
from retinue.server.bridge import Bridge
from retinue.server.call import Call, Piece
from retinue.server.gate import Receive, Scope, Send
from retinue.server.problem import Problem, problem_of

Result = TypeVar("Result")


class ClientLeft(Exception):
    """Nobody is there to read the answer."""


class Delivery:
    """One call on its way to one client. Whatever happens, the call is cancelled at its end."""

    def __init__(self, bridge: Bridge[Any], call: Call, shape: Shape, envelope: Envelope) -> None:
        self.bridge, self.call, self.shape, self.envelope = bridge, call, shape, envelope

    async def whole(self, receive: Receive) -> Response:
        """The answer at once. Raises Problem, and ClientLeft."""
        try:
            await unless_left(receive, self._collect())
        finally:
            self.bridge.cancel(self.call)
        choices = [self.shape.whole(i, pieces) for i, pieces in enumerate(self._given)]
        return JSONResponse(self.envelope.around(choices) | self._summary())

    async def stream(self, receive: Receive, *, with_usage: bool) -> Response:
        """The answer as it grows, once the engine has taken the call. Raises as `whole`."""
        try:
            await unless_left(receive, self.bridge.submit(self.call))
        except BaseException:
            self.bridge.cancel(self.call)
            raise
        events = self._events(with_usage=with_usage)
        return EventStream(events, lambda: self.bridge.cancel(self.call))

    def _summary(self) -> Json:
        return {"usage": usage(self.call), "retinue": ours(self.call)}

    async def _collect(self) -> None:
        self._given: list[list[Piece]] = [[] for _ in self.call.requests]
        await self.bridge.submit(self.call)
        async for piece in self._pieces():
            self._given[piece.choice].append(piece)

    async def _pieces(self) -> AsyncIterator[Piece]:
        """Every piece until all answers have ended. Raises Problem."""
        left = len(self.call.requests)
        while left:
            piece = await self.call.pieces.get()
            if isinstance(piece, Problem):
                raise piece
            if piece.finish in ("cancelled", "error"):
                raise Problem(500, "the request was cancelled", code="cancelled")
            left -= piece.finish is not None
            yield piece

    async def _events(self, *, with_usage: bool) -> AsyncIterator[str]:
        more: Json = {"usage": None} if with_usage else {}
        around = self.envelope.around
        try:
            async for piece in self._pieces():
                for choice in self.shape.chunks(piece):
                    yield _event(around([choice], chunk=True) | more)
            if with_usage:
                yield _event(around([], chunk=True) | self._summary())
        except Exception as error:
            yield _event(problem_of(error).as_dict())
        else:
            yield "data: [DONE]\n\n"


class EventStream(Response):
    """Sends events as they come. `leave` is called at the end, however it comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._leave = events, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, or as much as the client waits for."""
        try:
            with suppress(ClientLeft):
                await unless_left(receive, self._send(send))
        finally:
            self._leave()

    async def _send(self, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives. It is cancelled, and ClientLeft raised, when the client leaves before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(document: Json) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
