"""What every request passes before anything reads it: the route, the key, the kind and size of its
body. Holds no more bytes of bodies at once than the budget has for them.
"""

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from retinue.config import Config, parse_size
from retinue.server.problem import Problem

# What an ASGI server and application say to each other.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("retinue.server")

HELD_BODIES = 8  # of the longest, at once: more clients wait for theirs to be read
GUARDED = "/v1/"


class Stalled(Exception):
    """A client that does not read what it is sent."""


class Gate:
    """An ASGI application around another one; refuses in OpenAI's shape.

    A client that takes no byte of its answer within `time_limit` is left.
    `responded` is told the status of every answer. It leaves the task that follows from key or
    route in `scope["state"]["task"]`.
    """

    def __init__(self, app: Application, config: Config, responded: Callable[[int], None]) -> None:
        self._app, self._responded = app, responded
        self._tasks: Mapping[str, Mapping[str, str]] = config.keys
        self._routes = {prefix.rstrip("/"): task for prefix, task in config.routes.items()}
        keys = [*config.keys, *([config.api_key] if config.api_key else [])]
        self._keys = [key.encode() for key in keys]
        self._patience_s = config.time_limit
        self._longest = parse_size(config.max_body)
        self._room = HELD_BODIES * self._longest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._responded(message["status"])
            try:
                async with asyncio.timeout(self._patience_s):
                    await send(message)
            except TimeoutError as error:
                raise Stalled from error

        try:
            await self._pass(scope, receive, counted)
        except Problem as problem:
            await answer(problem, counted)
        except Stalled:
            log.info("a client has read nothing for %g s: it is left", self._patience_s)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        state["task"] = self._task_of_route(scope)
        if scope["path"].startswith(GUARDED):
            state["task"] = self._task_of_key(scope) or state["task"]
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        _check_kind(scope)
        await self._pass_body(scope, receive, send)

    def _task_of_route(self, scope: Scope) -> str | None:
        """Take a configured prefix off the path; returns its task."""
        for prefix, fields in self._routes.items():
            if scope["path"].startswith(f"{prefix}/"):
                scope["path"] = scope["path"][len(prefix) :]
                scope["raw_path"] = scope["path"].encode()
                return fields.get("task")
        return None

    def _task_of_key(self, scope: Scope) -> str | None:
        """Check the key, where keys are checked; returns the task that it stands for."""
        if not self._keys:
            return None
        given = _header(scope, b"authorization")
        scheme, _, key = given.partition(b" ")
        key = key.strip()
        # Each is compared, so that the time tells nothing of which came near.
        known = [hmac.compare_digest(key, each) for each in self._keys]
        if scheme.lower() != b"bearer" or not any(known):
            text = "the API key is wrong" if given else "an API key is needed: `Bearer KEY`"
            raise Problem(401, text, code="invalid_api_key")
        return self._tasks.get(key.decode(), {}).get("task")

    async def _pass_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, within its limit, and let the application read it again."""
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > self._longest:
            raise self._too_long()
        # What was announced is taken from the room at once; what was not, as if it were longest.
        count = int(announced) if announced.isdigit() else self._longest
        if count > self._room:
            text = "too many long requests at once"
            raise Problem(429, text, code="too_many_bytes", retry_after_s=1)
        self._room -= count
        try:
            body = await self._read(receive)
            if body is not None:
                self._room += count - len(body)
                count = len(body)
                await self._app(scope, _Replay(body, receive), send)
        finally:
            self._room += count

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where the client left before its end."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._longest:
                raise self._too_long()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_long(self) -> Problem:
        return Problem(413, f"the body is longer than {self._longest} bytes", code="body_too_long")


class _Replay:
    """Gives the body that was read, once, and then what comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def answer(problem: Problem, send: Send) -> None:
    """Send `problem` as the answer."""
    body = json.dumps(problem.as_dict()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers | problem.headers).items()]
    if problem.status == 413:
        pairs.append((b"connection", b"close"))  # what is left of the body is not read
    start = {"type": "http.response.start", "status": problem.status, "headers": pairs}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _check_kind(scope: Scope) -> None:
    kind = _header(scope, b"content-type").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise Problem(415, f"Content-Type has to be application/json, not {_shown(kind)}")
    coding = _header(scope, b"content-encoding").strip().lower()
    if coding not in (b"", b"identity"):
        raise Problem(415, f"Content-Encoding is not served: {_shown(coding)}")


def _shown(value: bytes) -> str:
    return value.decode("latin-1")[:60] or "nothing"


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")
