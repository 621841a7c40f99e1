"""A conversation: its messages, its file, and what is left of it in a full context."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from retinue.engine.template import Message, Rendered
from retinue.errors import UsageError

FORMAT = "retinue-chat"
VERSION = 1


@dataclass(slots=True)
class Conversation:
    """What was said: questions and answers in turn. The first `left_out` are no longer shown to
    the model, since they do not fit into its context."""

    system: str = ""
    messages: list[Message] = field(default_factory=list)
    left_out: int = 0

    def ask(self, text: str) -> None:
        """Add a question."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add an answer."""
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> str | None:
        """Take back the last question with its answer; returns the question, None without one."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                self.left_out = 0  # there may be room again
                return message["content"]
        return None

    def copy(self) -> "Conversation":
        """One that does not change with this one."""
        return Conversation(self.system, list(self.messages), self.left_out)

    def clear(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages, self.left_out = [], 0

    def shown(self) -> list[Message]:
        """The messages that the model sees, without the system prompt."""
        return self.messages[self.left_out :]

    def leave_out_oldest(self) -> bool:
        """Leave out one more turn, a question with its answer; False if only the last is left."""
        later = range(self.left_out + 1, len(self.messages))
        following = next((i for i in later if self.messages[i]["role"] == "user"), None)
        if following is None:
            return False
        self.left_out = following
        return True


def fit(
    conversation: Conversation, render_all: Callable[[], Rendered], room: int
) -> tuple[Rendered, int]:
    """Leave out the oldest turns until at most `room` tokens are left, or one question.

    Returns the rendered conversation and how many turns were left out now.
    """
    rendered, dropped = render_all(), 0
    while len(rendered.ids) > room and conversation.leave_out_oldest():
        rendered, dropped = render_all(), dropped + 1
    return rendered, dropped


def save(
    path: Path, conversation: Conversation, settings: dict[str, Any], *, overwrite: bool = False
) -> None:
    """Write everything that was said, whole or not at all. Raises UsageError if it cannot be."""
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"`{path}` exists", hint=f"overwrite it with `/save! {path}`")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "system": conversation.system,
        "messages": conversation.messages,
        "settings": settings,
    }
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        text = json.dumps(document, ensure_ascii=False, indent=1)
        # What was said may hold halves of characters.
        draft.write_text(text + "\n", encoding="utf-8", errors="replace")
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise UsageError(
            f"cannot write `{path}`: {error.strerror}", hint="name another file"
        ) from error


def load(path: Path) -> tuple[Conversation, dict[str, Any]]:
    """What `save` has written: the conversation and the settings. Raises UsageError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"cannot read `{path}`: {error.strerror}", hint="/save FILE writes one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _foreign(path, "it is not JSON") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _foreign(path, "it does not say that it is one")
    if document.get("version") != VERSION:
        raise _foreign(path, f"its version is {document.get('version')}, not {VERSION}")
    system, settings = document.get("system", ""), document.get("settings", {})
    messages = document.get("messages")
    if not isinstance(system, str) or not isinstance(settings, dict):
        raise _foreign(path, "its system prompt or its settings are damaged")
    if not isinstance(messages, list) or not all(_is_message(item) for item in messages):
        raise _foreign(path, "its messages are damaged")
    said = [{"role": item["role"], "content": item["content"]} for item in messages]
    if any(a["role"] == b["role"] for a, b in pairwise(said)):
        raise _foreign(path, "its questions and answers do not take turns")
    if said and (said[0]["role"], said[-1]["role"]) != ("user", "assistant"):
        raise _foreign(path, "it does not begin with a question and end with an answer")
    return Conversation(system, said), settings


def _is_message(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and item.get("role") in ("user", "assistant")
        and isinstance(item.get("content"), str)
    )


def _foreign(path: Path, why: str) -> UsageError:
    return UsageError(f"`{path}` is no saved chat: {why}", hint="/save FILE writes one")
