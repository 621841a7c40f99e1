"""Token ids to text, piece by piece, and the strings that end an answer."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns new ids into text as they come; holds back what may become a stop string.

    Without a tokenizer the text stays empty.
    """

    def __init__(self, tokenizer: Any | None, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._prefix, self._read = 0, 0  # ids from prefix give context, from read are new
        self._text = ""
        self._sent = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything so far, without a stop string."""
        return self._text

    def push(self, token_id: int) -> str:
        """Add one id; returns the text that may be shown now."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token_id)
        # Decoding with the ids before gives the right spaces; an unfinished character shows as
        # U+FFFD and waits for the next id.
        before = self._decode(self._ids[self._prefix : self._read])
        whole = self._decode(self._ids[self._prefix :])
        if len(whole) > len(before) and not whole.endswith("\ufffd"):
            self._text += whole[len(before) :]
            self._prefix, self._read = self._read, len(self._ids)
            self._cut()
        return self._release(len(self._text) if self.stopped else self._safe())

    def finish(self) -> str:
        """No more ids will come; returns what was held back."""
        if self._tokenizer is not None and not self.stopped:
            before = self._decode(self._ids[self._prefix : self._read])
            self._text += self._decode(self._ids[self._prefix :])[len(before) :]
            self._cut()
        return self._release(len(self._text))

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _cut(self) -> None:
        found = [at for stop in self._stop if (at := self._text.find(stop)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _safe(self) -> int:
        """Length of the text that no stop string can still swallow."""
        for length in range(min(len(self._text), max(map(len, self._stop), default=1) - 1), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stop):
                return len(self._text) - length
        return len(self._text)

    def _release(self, until: int) -> str:
        until = max(until, self._sent)
        piece, self._sent = self._text[self._sent : until], until
        return piece
