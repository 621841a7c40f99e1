"""From what a request says to token ids, checked against what the model can take."""

from collections.abc import Sequence
from typing import Any

from retinue.engine.template import Rendered, render
from retinue.errors import CheckpointError
from retinue.server.problem import Problem
from retinue.server.schema import ChatMessage


def chat_text(messages: Sequence[ChatMessage]) -> str:
    """All that was said, for those who ask what it is about."""
    return "\n".join(message.text for message in messages)


def chat_ids(tokenizer: Any | None, messages: Sequence[ChatMessage]) -> list[int]:
    """The conversation under the model's chat template. Raises Problem where it has no place."""
    if tokenizer is None:
        raise Problem(400, "the checkpoint has no tokenizer: there is no chat", param="messages")
    said = [{"role": _role(message), "content": message.text} for message in messages]
    if all(message["role"] == "system" for message in said):
        raise Problem(400, "there is nothing to answer in `messages`", param="messages")
    system = said.pop(0)["content"] if said[0]["role"] == "system" else ""
    try:
        rendered: Rendered = render(tokenizer, system, said)
    except CheckpointError as error:
        text = "the chat template of this model takes no such messages"
        raise Problem(400, f"{text}: {error.__cause__}", param="messages") from error
    return rendered.ids


def prompt_ids(tokenizer: Any | None, prompt: str | list[int]) -> list[int]:
    """The token ids of one prompt, with the tokenizer's own special tokens."""
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        text = "the checkpoint has no tokenizer: give token ids"
        raise Problem(400, text, param="prompt")
    return list(tokenizer(prompt)["input_ids"])


def check_length(count: int, asked: int | None, context: int, longest: int | None) -> None:
    """Raise Problem for a prompt of `count` tokens that leaves no room for the answer.

    asked: the length of the answer, where the request names one. longest: the server's own limit.
    """
    code = "context_length_exceeded"
    if longest is not None and count > longest:
        text = f"the prompt has {count} tokens, this server takes {longest}"
        raise Problem(400, text, param="prompt", code=code)
    if count + (asked or 1) > context:
        text = (
            f"the prompt has {count} tokens and its answer may have {asked or 1} (max_tokens):"
            f" the context has {context}"
        )
        raise Problem(400, text, param="max_tokens" if count < context else "prompt", code=code)


def _role(message: ChatMessage) -> str:
    """OpenAI's newer name for the system's role is one that templates do not know."""
    return "system" if message.role == "developer" else message.role
