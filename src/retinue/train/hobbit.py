"""HOBBIT's weights of its cache, by replay (arXiv 2411.01433, section 3.4).

The least of w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - d/l_n) leaves, see
`policy/evict/multidimensional.py`. Weights that sum to 1 are tried in steps of a quarter, all at
once on the same tokens. What is missing costs 1 in high precision and a quarter in low, as int4 is
a quarter of 16 bits; what is there in low precision and needed in high is missing; the tail of a
token, where the better ones have more than 0.9 of its weight, is skipped. A quarter of the experts
have room. Counts begin anew with each text, the cache does not.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from retinue.policy.precision.by_share import HIGH_UP_TO
from retinue.policy.ranks import before, shares
from retinue.policy.thin.missing_tail import SKIP_ABOVE
from retinue.train.examples import Example
from retinue.types import FloatArray, IntArray

STEPS = 4  # of a weight, from 0 to 1
LOW_COST = 0.25
ROOM = 0.25  # of the experts
TOKENS = 3000  # that are replayed, evenly from all texts


def combinations() -> FloatArray:
    """Every choice of weights: [n, 4], recency alone first, use alone second."""
    found = [w for w in product(range(STEPS + 1), repeat=4) if sum(w) == STEPS]
    found.sort(key=lambda w: (w[0], w[1]), reverse=True)
    alone = [(STEPS, 0, 0, 0), (0, STEPS, 0, 0)]
    rest = [w for w in found if w not in alone]
    return np.asarray(np.array([*alone, *rest]) / STEPS, dtype=np.float32)


def hobbit(examples: Sequence[Example], experts: int) -> dict[str, FloatArray]:
    """Arrays of kind `hobbit`: the weights with the least penalty; of equal ones the first."""
    tried = combinations()
    return {"weights": tried[int(penalties(examples, experts, tried).argmin())]}


def penalties(examples: Sequence[Example], experts: int, tried: FloatArray) -> FloatArray:
    """What a token costs with each row of weights `tried` [n, 4], in reads of an expert: [n]."""
    rows = examples[0].experts.shape[1]
    cache, cost, tokens = _Caches(tried, rows, experts), np.zeros(len(tried), np.float32), 0
    for ids, scores in _tokens(examples, experts):
        if ids is None:
            cache.begin()
            continue
        cache.tokens += 1
        tokens += 1
        for row in range(rows):
            there = ids[row] < experts
            cost += cache.use(row, ids[row, there], scores[row, there])
    return np.asarray(cost / max(tokens, 1), dtype=np.float32)


def _tokens(
    examples: Sequence[Example], experts: int
) -> Iterator[tuple[IntArray | None, FloatArray]]:
    """Each text's first tokens of its answer, a None before them."""
    each = max(1, TOKENS // len(examples))
    for one in examples:
        yield None, np.empty(0, np.float32)
        part = slice(one.prompt_tokens, one.prompt_tokens + each)
        for ids, weights in zip(one.experts[part], one.weights[part], strict=True):
            yield ids, before(shares(ids, weights, experts))


class _Caches:
    """As many caches as there are weights, which all see the same tokens."""

    def __init__(self, weights: FloatArray, rows: int, experts: int) -> None:
        self._weights, self._rows, self._experts = weights, rows, experts
        self._room = max(2 * rows, round(ROOM * rows * experts))
        self._there = np.zeros((len(weights), rows * experts), dtype=bool)
        self._high = np.zeros_like(self._there)
        self._layer = np.repeat(np.arange(rows), experts)
        self.tokens = 0
        self.begin()

    def begin(self) -> None:
        """A text begins."""
        self.tokens = 0
        self._last, self._uses, self._demands = np.zeros((3, self._there.shape[1]), np.float32)

    def use(self, row: int, ids: IntArray, scores: FloatArray) -> FloatArray:
        """A token's experts in one layer; returns what each cache has to pay: [caches]."""
        at = row * self._experts + ids
        high = scores <= HIGH_UP_TO
        self._last[at] = self.tokens
        self._uses[at] += 1
        self._demands[at] += high
        missing = ~self._there[:, at] | (high & ~self._high[:, at])
        missing &= ~((scores > SKIP_ABOVE) & ~self._there[:, at])
        new = missing & ~self._there[:, at]
        self._make_room(row, at, new.sum(axis=1))
        self._there[:, at] |= missing
        self._high[:, at] |= missing & high
        return np.asarray((missing * np.where(high, 1, LOW_COST)).sum(axis=1), dtype=np.float32)

    def _make_room(self, row: int, needed: IntArray, new: IntArray) -> None:
        """Let the least of each cache leave, but not what this layer needs."""
        leaving = new - (self._room - self._there.sum(axis=1))
        most = int(leaving.max(initial=0))
        if most <= 0:
            return
        away = (self._layer - row - 1) % self._rows + 1
        known = np.stack([self._last, self._uses, self._demands]) / max(self.tokens, 1)
        priorities = self._weights @ np.concatenate([known, 1 - away[None] / self._rows])
        priorities[~self._there] = np.inf
        priorities[:, needed] = np.inf
        order = np.argsort(priorities, axis=1, kind="stable")[:, :most]
        cache, place = np.nonzero(np.arange(most) < leaving[:, None])
        gone = order[cache, place]
        self._there[cache, gone] = self._high[cache, gone] = False
