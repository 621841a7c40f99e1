"""The answers of both endpoints in OpenAI's shapes, whole and in chunks. Plain dictionaries."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from retinue.metrics import Costs
from retinue.server.call import Call, Piece
from retinue.types import TokenLogprob

Json = dict[str, Any]
UNFINISHED = "\ufffd"  # what a part of a character decodes to


class Shape(Protocol):
    """How one endpoint writes what it says."""

    def whole(self, choice: int, pieces: Sequence[Piece]) -> Json:
        """One choice of an answer that is sent at once."""
        ...

    def chunks(self, piece: Piece) -> list[Json]:
        """One choice of each chunk that tells of `piece`."""
        ...


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every answer and chunk has around its choices."""

    model: str
    kind: str
    chunk_kind: str
    prefix: str
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: list[Json], *, chunk: bool = False) -> Json:
        """The document with `choices`."""
        return {
            "id": f"{self.prefix}-{self.identity}",
            "object": self.chunk_kind if chunk else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def chat_envelope(model: str) -> Envelope:
    """What is around the choices of `/v1/chat/completions`."""
    return Envelope(model, "chat.completion", "chat.completion.chunk", "chatcmpl")


def completion_envelope(model: str) -> Envelope:
    """What is around the choices of `/v1/completions`."""
    return Envelope(model, "text_completion", "text_completion", "cmpl")


class ChatShape:
    """Choices of `/v1/chat/completions`."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._begun: set[int] = set()

    def whole(self, choice: int, pieces: Sequence[Piece]) -> Json:
        """See `Shape`."""
        text = "".join(piece.text for piece in pieces)
        return {
            "index": choice,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs([item for piece in pieces for item in piece.logprobs]),
            "finish_reason": pieces[-1].finish,
        }

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Shape`."""
        delta: Json = {"content": piece.text} if piece.text or piece.finish is None else {}
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            delta = {"role": "assistant", "content": piece.text}
        chunk = {
            "index": piece.choice,
            "delta": delta,
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish,
        }
        return [chunk] if piece.text or piece.logprobs or piece.finish else []

    def _logprobs(self, items: Sequence[TokenLogprob]) -> Json | None:
        if not items:
            return None
        content = []
        for item in items:
            top = [self._token(token, value) for token, value in item.top]
            content.append(self._token(item.token_id, item.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text = token_text(self._tokenizer, token)
        known = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}


class CompletionShape:
    """Choices of `/v1/completions`. `echoes` are the texts that stand before each choice."""

    def __init__(self, tokenizer: Any | None, echoes: Sequence[str] = ()) -> None:
        self._tokenizer, self._echoes = tokenizer, echoes
        self._offsets: dict[int, int] = {}  # where the text of the next token begins

    def whole(self, choice: int, pieces: Sequence[Piece]) -> Json:
        """See `Shape`."""
        text = "".join(piece.text for piece in pieces)
        items = [item for piece in pieces for item in piece.logprobs]
        return {
            "index": choice,
            "text": self._echo(choice) + text,
            "logprobs": self._logprobs(choice, items),
            "finish_reason": pieces[-1].finish,
        }

    def chunks(self, piece: Piece) -> list[Json]:
        """See `Shape`."""
        first = piece.choice not in self._offsets
        echo = self._echo(piece.choice) if first else ""
        self._offsets.setdefault(piece.choice, 0)
        chunk = {
            "index": piece.choice,
            "text": echo + piece.text,
            "logprobs": self._logprobs(piece.choice, piece.logprobs),
            "finish_reason": piece.finish,
        }
        return [chunk] if echo or piece.text or piece.logprobs or piece.finish else []

    def _echo(self, choice: int) -> str:
        return self._echoes[choice] if self._echoes else ""

    def _logprobs(self, choice: int, items: Sequence[TokenLogprob]) -> Json | None:
        if not items:
            return None
        texts = [token_text(self._tokenizer, item.token_id) for item in items]
        at, offsets = self._offsets.get(choice, 0), []
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[choice] = at
        top = [
            {token_text(self._tokenizer, token): value for token, value in item.top}
            for item in items
        ]
        return {
            "tokens": texts,
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": top,
            "text_offset": offsets,
        }


def token_text(tokenizer: Any | None, token: int) -> str:
    """One token as text; its number where there is no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token}"
    return str(tokenizer.decode([token]))


def usage(call: Call) -> Json:
    """What the call took, in tokens. A prompt of several answers counts once."""
    prompt = sum(len(group[0].prompt) for group in call.groups)
    answer = sum(len(request.token_ids) for request in call.requests)
    reused = sum(group[0].reused for group in call.groups)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def ours(call: Call) -> Json:
    """What OpenAI's answers lack: whom it was for, and what the call took of the experts."""
    total = Costs()
    for request in call.requests:
        for phase in ("prefill", "decode"):
            total.of(phase).add(request.costs.of(phase))
    both = [total.prefill, total.decode]
    routed = sum(each.routed_weight for each in both)
    degraded = sum(each.degraded_weight for each in both)
    return {
        "user": call.user,
        "task": call.requests[0].task,
        "hits": sum(each.hits for each in both),
        "pending": sum(each.pending for each in both),
        "misses": sum(each.misses for each in both),
        "bytes_read": sum(each.bytes_read for each in both),
        "degraded_share": degraded / routed if routed else 0.0,
    }
