"""Messages to token ids, under the chat template of the checkpoint's own tokenizer."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from retinue.errors import CheckpointError

Message = dict[str, str]

THINKING = "<think>"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids of a conversation, and how its text ends where the answer will begin."""

    ids: list[int]
    system_moved: bool = False
    thinking: bool = False


def render(tokenizer: Any, system: str, messages: list[Message]) -> Rendered:
    """The conversation under the template of `tokenizer`; plain text without one.

    A template that refuses the system role, or drops it, gets the system prompt at the beginning
    of the first question. Raises CheckpointError when the template fails.
    """
    own: list[Message] = [{"role": "system", "content": system}] if system else []
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in [*own, *messages]) + "\n"
        return Rendered(list(tokenizer(text)["input_ids"]))
    try:
        text, moved = _apply(tokenizer, [*own, *messages]), False
        refused = bool(system) and system.strip() not in text
    except TemplateError as error:
        if not system:
            raise _failed(error) from error
        refused = True
    if refused:
        text, moved = _with_system_first(tokenizer, system, messages), True
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Rendered(ids, moved, text.rstrip().endswith(THINKING))


def _with_system_first(tokenizer: Any, system: str, messages: list[Message]) -> str:
    first, *rest = messages
    first = first | {"content": f"{system}\n\n{first['content']}"}
    try:
        return _apply(tokenizer, [first, *rest])
    except TemplateError as error:
        raise _failed(error) from error


def _apply(tokenizer: Any, messages: list[Message]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _failed(error: TemplateError) -> CheckpointError:
    return CheckpointError(
        f"the chat template of the checkpoint fails: {error}",
        hint="without /system, or after /clear, it may work",
    )
