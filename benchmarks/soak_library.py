"""Requests of the soak through the real `openai` client, and what became of each."""

from typing import Any

import openai


class Lost(Exception):
    """The server closed, or said nothing, where it owed an answer."""


class Library:
    """One `openai` client, which asks a server on this machine and tries nothing twice."""

    def __init__(self, port: int) -> None:
        url = f"http://127.0.0.1:{port}/v1"
        self._client = openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0)

    async def ask(self, body: dict[str, Any], *, leave_after: int | None = None) -> str:
        """Send a completion's or a chat's body; returns the status, and the code of an error.

        leave_after: events of a stream, after which the client goes. Raises Lost.
        """
        body = dict(body)
        extra = {"task": body.pop("task", None), "tools": body.pop("tools", None)}
        extra = {name: value for name, value in extra.items() if value is not None}
        api: Any = self._client.chat.completions if "messages" in body else self._client.completions
        try:
            found = await api.create(**body, extra_body=extra)
            if not body.get("stream"):
                assert len(found.choices) == body.get("n", 1)
                return "200"
            return await _read(found, leave_after)
        except openai.APIStatusError as error:
            return f"{error.status_code} {error.code}"
        except openai.APIConnectionError as error:
            raise Lost(repr(error.__cause__ or error)[:60]) from error
        except openai.APIError:  # an event of a stream says so
            return "200, an error at its end"

    async def close(self) -> None:
        """Let its connections go."""
        await self._client.close()


async def _read(stream: Any, leave_after: int | None) -> str:
    """Read a stream to its end, or some events of it."""
    events, finished = 0, False
    async for event in stream:
        events += 1
        if events == leave_after:
            await stream.close()
            return "left"
        finished = finished or any(choice.finish_reason for choice in event.choices)
    if not finished:
        raise Lost("a stream that only stops")
    return "200"
