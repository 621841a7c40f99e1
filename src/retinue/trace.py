"""Routing traces: which experts every token of a request chose, in one compressed file.

A trace is a zip archive: `head.json`, and for each request one member of plain numbers, so that
nothing is executed by reading one, and damage shows; each signal of a request is a member of its
own. It knows no model: whoever records gives it arrays. A file is written whole or not at all, and
read a request at a time.
"""

import json
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from retinue.errors import UsageError, WriteError
from retinue.types import Facts, FloatArray, IntArray

FORMAT, VERSION = "retinue-trace", 2
READS = (1, 2)  # version 1 has neither signals nor facts
Detail = Literal["tokens", "histogram"]
AHEAD = ("next_scores", "second_scores", "third_scores")  # of routers one, two and three layers on
SIGNALS = ("scores", *AHEAD, "hidden", "embedding", "token_ids")
Signals = Mapping[str, npt.NDArray[Any]]
_HEAD = "head.json"
_DAMAGE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


def answers(ahead: int, *, own: bool) -> tuple[str, ...]:
    """The signals that hold what routers say of so many layers ahead, and of their own turn."""
    return (("scores",) if own else ()) + AHEAD[:ahead]


@dataclass(frozen=True, slots=True)
class TraceHead:
    """What all requests of a trace share. `routed` are the decoder layers that have experts.

    `detail` says what is kept: every token's choice, in its order, or only sums by expert; and
    `signals` what else, of every token or request (see `Routed`). `width` is that of the model's
    hidden state, `read_bytes` what reading one expert moves here, 0 where they are not known.
    `facts` are what a cost model needs to know of the model in the `precision` that it ran in; None
    in traces of version 1.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    routed: tuple[int, ...]
    detail: Detail = "tokens"
    signals: tuple[str, ...] = ()
    width: int = 0
    precision: str = "as-is"
    facts: Facts | None = None
    read_bytes: int = 0

    def shape(self, signal: str, tokens: int) -> tuple[int, ...]:
        """What `signal` of a request of `tokens` is: see `Routed`."""
        routed = len(self.routed)
        if signal in AHEAD:
            return tokens, max(0, routed - 1 - AHEAD.index(signal)), self.experts
        return {
            "scores": (tokens, routed, self.experts),
            "hidden": (tokens, routed, self.width),
            "embedding": (self.width,),
            "token_ids": (tokens,),
        }[signal]

    @property
    def token_bytes(self) -> int:
        """What a token takes before compression, in a trace with every token."""
        return len(self.routed) * self.top_k * (self._ids.itemsize + 2)

    @property
    def _ids(self) -> np.dtype[Any]:
        """The type of ids; one more than the experts stands for none."""
        return np.dtype(np.uint8 if self.experts < 256 else np.uint16)


@dataclass(frozen=True, slots=True)
class Routed:
    """One request: its routing in `head.routed`'s layers, over prompt and answer.

    With every token `experts` and `weights` are [tokens, routed, k], the prompt's tokens first; an
    id of `head.experts` or more means none, and weights are rounded to fp16. `sums` is
    [2, routed, experts]: the routing weight of each expert in the prompt and in the answer.

    `signals` holds, rounded to fp16, those of the head's that were asked for. `scores` are what
    each layer's own router says of its input; those of `AHEAD` what the router of the next layer,
    the second or the third one says of it: probabilities [tokens, routed, experts], for these
    without the last layers, which have no such one. `hidden` are these inputs [tokens, routed,
    width], `embedding` the mean of the prompt's tokens' [width]. `token_ids` [tokens] are whole
    numbers.
    """

    task: str | None
    prompt_tokens: int
    answer_tokens: int
    sums: FloatArray
    experts: IntArray | None = None
    weights: FloatArray | None = None
    signals: Signals = field(default_factory=dict)

    def used(self, head: TraceHead, *, answer: bool = False) -> FloatArray:
        """Summed routing weight of each expert in the prompt, or in the answer: [layers, experts].

        Layers without experts are 0.
        """
        used = np.zeros((head.layers, head.experts), np.float32)
        used[list(head.routed)] = self.sums[int(answer)]
        return used


def routed_of(
    head: TraceHead, task: str | None, prompt_tokens: int, experts: IntArray, weights: FloatArray
) -> Routed:
    """The request whose tokens chose `experts` with `weights`, both [tokens, routed, k]."""
    sums = np.zeros((2, len(head.routed), head.experts), np.float32)
    there = (experts >= 0) & (experts < head.experts)
    token, layer, _ = np.nonzero(there)
    answer = (token >= prompt_tokens).astype(np.int64)
    np.add.at(sums, (answer, layer, experts[there]), weights[there])
    kept = np.where(there, experts, head.experts)
    return Routed(task, prompt_tokens, len(experts) - prompt_tokens, sums, kept, weights)


class TraceWriter:
    """Writes a trace, request by request; the file appears when the `with` ends without an error.

    Raises WriteError where the disk does not take it.
    """

    def __init__(self, file: Path, head: TraceHead) -> None:
        self.head, self.requests, self.tokens = head, 0, 0
        self._file, self._draft = file, file.with_name(f".{file.name}.part")
        self._entries: list[tuple[str | None, int, int]] = []
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._archive = zipfile.ZipFile(self._draft, "w", zipfile.ZIP_DEFLATED)
        except OSError as error:
            raise self._unwritten(error) from error

    def add(self, request: Routed) -> None:
        """Append one request. Raises WriteError."""
        members = {str(self.requests): _encode(self.head, request)}
        for signal in self.head.signals:
            members[f"{self.requests}.{signal}"] = _encode_signal(signal, request.signals[signal])
        try:
            for name, content in members.items():
                self._archive.writestr(name, content)
        except OSError as error:
            raise self._unwritten(error) from error
        self._entries.append((request.task, request.prompt_tokens, request.answer_tokens))
        self.requests += 1
        self.tokens += request.prompt_tokens + request.answer_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError):
                self._archive.close()
            self._draft.unlink(missing_ok=True)

    def _finish(self) -> None:
        head = {"format": FORMAT, "version": VERSION, **asdict(self.head)}
        try:
            self._archive.writestr(_HEAD, json.dumps(head | {"requests": self._entries}))
            self._archive.close()
            self._draft.replace(self._file)
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> WriteError:
        return WriteError(
            f"cannot write the trace `{self._file}`: {error}",
            hint="give another place with `--out`, or make room; nothing was left behind",
        )


class Trace:
    """A trace in a file: `head`, how many requests, and each of them when it is asked for.

    Raises UsageError where the file is none, damaged, cut off or of another version.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with zipfile.ZipFile(file) as archive:
                content = json.loads(archive.read(_HEAD))
        except (*_DAMAGE, KeyError, ValueError) as error:
            raise self._damaged(error) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise self._damaged("its head is another format's")
        if content.get("version") not in READS:
            raise UsageError(
                f"`{file}`: unknown version of a trace: `{content.get('version')}`",
                hint=f"this version of retinue reads {VERSION} and earlier; record it again",
            )
        try:
            self.head = _head_from(content)
            self._entries = [_entry_from(row) for row in content["requests"]]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> int:
        """Of all requests, prompts and answers."""
        return sum(prompt + answer for _, prompt, answer in self._entries)

    @property
    def tasks(self) -> list[str | None]:
        """The task of each request."""
        return [task for task, _, _ in self._entries]

    def __iter__(self) -> Iterator[Routed]:
        """Each request in its order, without signals, read when it is asked for.

        Raises UsageError for damage.
        """
        return self.requests()

    def requests(self, signals: Collection[str] = ()) -> Iterator[Routed]:
        """The same with those of the head's `signals`. Raises UsageError for damage."""
        assert set(signals) <= set(self.head.signals), signals
        try:
            with zipfile.ZipFile(self.file) as archive:
                for number, entry in enumerate(self._entries):
                    content = self._member(archive, str(number), _size(self.head, entry))
                    found = {name: self._signal(archive, number, name) for name in signals}
                    yield _decode(self.head, entry, content, found)
        except (*_DAMAGE, KeyError) as error:
            raise self._damaged(error) from error

    def _signal(self, archive: zipfile.ZipFile, number: int, name: str) -> npt.NDArray[Any]:
        _, prompt, answer = self._entries[number]
        shape = self.head.shape(name, prompt + answer)
        size = _kind(name).itemsize * int(np.prod(shape))
        return _decode_signal(name, self._member(archive, f"{number}.{name}", size), shape)

    def _member(self, archive: zipfile.ZipFile, name: str, size: int) -> bytes:
        if archive.getinfo(name).file_size != size:
            raise self._damaged(f"request {name} does not have {size} bytes")
        return archive.read(name)

    def _damaged(self, reason: object) -> UsageError:
        return UsageError(
            f"cannot read the trace `{self.file}`: {reason}",
            hint="it is damaged, cut off or no trace; record it again with `retinue trace`",
        )


def check_same_model(head: TraceHead, other: TraceHead, file: Path) -> None:
    """Raise UsageError unless the trace `other` of `file` may be appended to one of `head`.

    A trace with every token may be appended to one without, not the other way round; and so one
    with more signals to one with fewer.
    """
    if _model(other) != _model(head):
        raise UsageError(
            f"the trace `{file}` is of another model: `{other.model}`, {other.layers} layers of"
            f" {other.experts} experts, top {other.top_k}; this one is `{head.model}`,"
            f" {head.layers} of {head.experts}, top {head.top_k}",
            hint="merge traces of one model only",
        )
    if other.detail == "histogram" and head.detail == "tokens":
        raise UsageError(
            f"the trace `{file}` has no tokens, only sums",
            hint="record with `--detail histogram`, or record that trace again",
        )
    if missing := [name for name in head.signals if name not in other.signals]:
        raise UsageError(
            f"the trace `{file}` has no signal `{missing[0]}`",
            hint="leave it out of `--signals`, or record that trace again",
        )
    if other.facts is not None and other.precision != head.precision:
        raise UsageError(
            f"the trace `{file}` is of another precision: `{other.precision}`, this one is of"
            f" `{head.precision}`",
            hint="merge traces of one precision only",
        )


def _model(head: TraceHead) -> tuple[int, int, int, tuple[int, ...]]:
    return head.layers, head.experts, head.top_k, head.routed


def append(writer: TraceWriter, requests: Iterable[Routed]) -> None:
    """Append requests of a trace of the same model. Raises WriteError, or UsageError of a read."""
    for request in requests:
        writer.add(request)


def _encode(head: TraceHead, request: Routed) -> bytes:
    if head.detail == "histogram":
        return request.sums.astype("<f4").tobytes()
    assert request.experts is not None
    assert request.weights is not None
    ids = request.experts.astype(head._ids.newbyteorder("<")).tobytes()
    return ids + request.weights.astype("<f2").tobytes()


def _kind(signal: str) -> np.dtype[Any]:
    return np.dtype("<i4" if signal == "token_ids" else "<f2")


def _encode_signal(signal: str, values: npt.NDArray[Any]) -> bytes:
    """First the lowest byte of all numbers, then the next one: that way they compress."""
    kind = _kind(signal)
    if kind.kind == "f":
        most = np.finfo(np.float16).max  # hidden states may be larger than fp16 knows
        values = np.clip(values, -most, most)
    planes = values.astype(kind).reshape(-1).view(np.uint8).reshape(-1, kind.itemsize).T
    return planes.tobytes()


def _decode_signal(signal: str, content: bytes, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    kind = _kind(signal)
    planes = np.frombuffer(content, np.uint8).reshape(kind.itemsize, -1)
    numbers = np.ascontiguousarray(planes.T).view(kind).reshape(shape)
    return numbers.astype(np.float32 if kind.kind == "f" else np.int64)


def _decode(
    head: TraceHead,
    entry: tuple[str | None, int, int],
    content: bytes,
    signals: Signals,
) -> Routed:
    task, prompt, answer = entry
    if head.detail == "histogram":
        sums = np.frombuffer(content, "<f4").reshape(2, len(head.routed), head.experts)
        return Routed(task, prompt, answer, sums.astype(np.float32), signals=signals)
    shape = (prompt + answer, len(head.routed), head.top_k)
    ids = np.frombuffer(content, head._ids.newbyteorder("<"), count=int(np.prod(shape)))
    weights = np.frombuffer(content, "<f2", offset=ids.nbytes)
    experts = ids.reshape(shape).astype(np.int64)
    given = weights.reshape(shape).astype(np.float32)
    return replace(routed_of(head, task, prompt, experts, given), signals=signals)


def _size(head: TraceHead, entry: tuple[str | None, int, int]) -> int:
    if head.detail == "histogram":
        return 2 * len(head.routed) * head.experts * 4
    return (entry[1] + entry[2]) * head.token_bytes


def _head_from(content: dict[str, Any]) -> TraceHead:
    layers, experts, top_k = (int(content[key]) for key in ("layers", "experts", "top_k"))
    routed = tuple(int(layer) for layer in content["routed"])
    detail = content["detail"]
    if min(layers, experts, top_k) < 1 or not set(routed) <= set(range(layers)) or not routed:
        raise ValueError("layers or experts are out of range")
    if detail not in ("tokens", "histogram"):
        raise ValueError(f"detail is `{detail}`")
    signals = tuple(str(name) for name in content.get("signals", ()))
    width = int(content.get("width", 0))
    if not set(signals) <= set(SIGNALS) or width < 0:
        raise ValueError(f"signals are {signals}, width is {width}")
    facts = Facts(**content["facts"]) if content.get("facts") else None
    precision = str(content.get("precision", "as-is"))
    shape = (layers, experts, top_k, routed)
    head = TraceHead(str(content["model"]), *shape, detail, signals, width, precision, facts)
    return replace(head, read_bytes=int(content.get("read_bytes", 0)))


def _entry_from(row: Any) -> tuple[str | None, int, int]:
    task, prompt, answer = row
    if not (task is None or isinstance(task, str)) or min(prompt, answer) < 0:
        raise ValueError(f"a request is damaged: {row}")
    return task, int(prompt), int(answer)
