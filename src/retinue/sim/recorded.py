"""A trace in memory, as a replay needs it: requests as arrays, and what passes demand of a layer.

What one token demands in every layer is worked out for a whole request at once. Weights in a trace
are rounded to fp16, which makes some equal that were not; the rank in the router's own order tells
them apart again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from retinue.errors import UsageError
from retinue.trace import Routed, Trace, TraceHead
from retinue.types import Demand, FloatArray, IntArray

RANK = 1e-6  # what a place in the router's order tells, of a weight


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `start` to `stop` of the request with this number, in one pass."""

    request: int
    start: int
    stop: int


@dataclass(slots=True)
class Recorded:
    """One request. `experts` and `weights` are [tokens, routed, k], ids beyond the last are none.

    `alone` are the same by ascending id, for passes of one token; `plain` says that each token has
    k different experts in every layer, so that these are its demands.
    """

    task: str | None
    prompt_tokens: int
    tokens: int
    experts: IntArray
    weights: FloatArray
    signals: dict[str, FloatArray]
    token_ids: IntArray
    alone: tuple[IntArray, FloatArray] = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        order = np.argsort(self.experts, axis=2, kind="stable")
        ids = np.take_along_axis(self.experts, order, axis=2)
        self.alone = ids, np.take_along_axis(self.weights, order, axis=2)
        self.plain = False

    @property
    def answer_tokens(self) -> int:
        """Tokens that are decoded."""
        return self.tokens - self.prompt_tokens


class Recording:
    """All requests of a trace, with those `signals` that it has and that are asked for."""

    def __init__(self, trace: Trace, signals: Sequence[str] = ()) -> None:
        self.head = head = trace.head
        if head.detail != "tokens":
            raise UsageError(
                f"the trace `{trace.file}` has no tokens, only sums",
                hint="record it again with `--detail tokens`",
            )
        found = [name for name in signals if name in head.signals]
        self.requests = [_recorded(head, request) for request in trace.requests(found)]
        self._ones = np.ones(head.top_k, dtype=np.int64)

    @property
    def pairs(self) -> int:
        """Tokens times layers with experts."""
        return sum(request.tokens for request in self.requests) * len(self.head.routed)

    def demands(self, parts: Sequence[Part]) -> list[Demand]:
        """What a pass over `parts` demands of each layer with experts, in their order."""
        if len(parts) == 1 and parts[0].stop - parts[0].start == 1:
            request = self.requests[parts[0].request]
            if request.plain:
                return self._of_token(request, parts[0].start)
        return self._of_many(*self.rows(parts, slice(None)))

    def rows(self, parts: Sequence[Part], place: int | slice) -> tuple[IntArray, FloatArray]:
        """Experts and weights of the parts' tokens in the layer at `place`, [tokens, k] each."""
        if len(parts) == 1:
            (part,) = parts
            request, tokens = self.requests[part.request], slice(part.start, part.stop)
            return request.experts[tokens, place], request.weights[tokens, place]
        each = [(self.requests[part.request], slice(part.start, part.stop)) for part in parts]
        experts = [request.experts[tokens, place] for request, tokens in each]
        weights = [request.weights[tokens, place] for request, tokens in each]
        return np.concatenate(experts), np.concatenate(weights)

    def signal(self, name: str, parts: Sequence[Part], place: int) -> FloatArray | None:
        """A signal of the parts' tokens in the layer at `place` of the routed: [tokens, ...]."""
        if len(parts) == 1:
            (part,) = parts
            known = self.requests[part.request].signals.get(name)
            return None if known is None else known[part.start : part.stop, place]
        found = [
            self.requests[part.request].signals[name][part.start : part.stop, place]
            for part in parts
            if name in self.requests[part.request].signals
        ]
        if len(found) < len(parts):
            return None
        return np.concatenate(found)

    def token_ids(self, parts: Sequence[Part]) -> IntArray:
        """The parts' token ids: [tokens]; empty where they were not recorded."""
        each = [self.requests[part.request].token_ids[part.start : part.stop] for part in parts]
        return np.concatenate(each)

    def _of_token(self, request: Recorded, token: int) -> list[Demand]:
        ids, weights = request.alone
        rows = zip(self.head.routed, ids[token], weights[token], strict=True)
        return [Demand(layer, row, self._ones, weight) for layer, row, weight in rows]

    def _of_many(self, experts: IntArray, weights: FloatArray) -> list[Demand]:
        routed, width = len(self.head.routed), self.head.experts + 1
        at = experts + np.arange(routed)[:, None] * width  # the last column of a row is none
        tokens = np.bincount(at.ravel(), minlength=routed * width).reshape(routed, width)
        sums = np.bincount(at.ravel(), weights.ravel(), minlength=routed * width)
        sums = sums.reshape(routed, width).astype(np.float32)
        demands = []
        for place, layer in enumerate(self.head.routed):
            ids = np.flatnonzero(tokens[place, :-1])
            demands.append(Demand(layer, ids, tokens[place, ids], sums[place, ids]))
        return demands


def _recorded(head: TraceHead, request: Routed) -> Recorded:
    assert request.experts is not None
    assert request.weights is not None
    signals = dict(request.signals)
    token_ids = signals.pop("token_ids", np.zeros(0, np.float32)).astype(np.int64)
    weights = request.weights * (1 - RANK * np.arange(head.top_k, dtype=np.float32))
    tokens = len(request.experts)
    found = Recorded(
        request.task, request.prompt_tokens, tokens, request.experts, weights, signals, token_ids
    )
    ids = found.alone[0]
    found.plain = bool((ids[..., -1] < head.experts).all() and (np.diff(ids, axis=2) > 0).all())
    return found
