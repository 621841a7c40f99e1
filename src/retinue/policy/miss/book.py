"""Who is in a layer's slots, token by token: what a token fetches, and who leaves for it.

One book a layer. It takes a layer's tokens in row order and decides as if each had been decoded by
itself, so that whole texts, prefill in chunks and decoding give the same answers. It knows numbers
alone: the cache, which does the reading, is brought to where the book stands.

A missing expert whose share of its token's routing weight is above a threshold is fetched; the
others are left to the routing policy. Beyond eMoE (arXiv 2503.06823), which fetches nothing; the
score test for misses is that of HOBBIT (arXiv 2411.01433), which however reads a smaller form of
the expert below its threshold. Who leaves is the coldest by decayed routing weight, which starts
from what the placement knew.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retinue.policy.base import BoolArray, Choice
from retinue.types import FloatArray, IntArray

Shares = npt.NDArray[np.float64]
HALF_LIFE = 64  # tokens after which routing weight counts half, see docs/LOG.md
PRIOR = 0.25  # of what is known before counts: a text soon departs from its task
_GAINS = 2.0 ** (np.arange(HALF_LIFE) / HALF_LIFE)
_KNOWN = float(PRIOR * _GAINS.sum())  # what a share that is known counts as
_NONE = np.zeros(1, dtype=np.int64)
_NONE.setflags(write=False)
_BLOCK = 64  # tokens that are searched at once for the next one that fetches


@dataclass(frozen=True, slots=True)
class Served:
    """What a book decided for some tokens of its layer."""

    may: BoolArray  # [tokens, experts], who may serve each token; never write, nor `stay`
    fetched: IntArray  # [n], in the order of fetching; twice where it left in between
    missed: IntArray  # [tokens], how many of each token's experts were not there
    reads: IntArray  # [tokens], how many of those it fetched
    stay: BoolArray  # [experts], who is there after the last token


class LayerBook:
    """The slots of one layer. `there` [experts] says who begins in them, and so how many there are.

    popularity: [experts], each one's share of routing weight as far as it is known. above: the
    share of a token's weight beyond which a missing expert is fetched; 1: never, 0: always.
    """

    def __init__(self, there: BoolArray, popularity: Shares, above: float) -> None:
        self.there, self._above = there.copy(), above  # `there` is replaced, never written
        self.expect(popularity)

    def expect(self, popularity: Shares) -> None:
        """Forget what was counted: from now on it is `popularity` that is known."""
        # Tokens that had always been routed by it would leave the sum of all gains.
        self._heat = popularity * _KNOWN
        self._clock = 0  # tokens since heat was halved

    def copy(self) -> "LayerBook":
        """The same book, to be written on."""
        other = LayerBook.__new__(LayerBook)
        other.there, other._above = self.there, self._above
        other._heat, other._clock = self._heat.copy(), self._clock
        return other

    def serve(self, choice: Choice) -> Served:
        """Decide for the tokens of `choice`, one after the other, and remember it."""
        experts, count = choice.experts, len(choice.experts)
        if count == 1:
            return self._serve_one(experts[0], choice.weights[0])
        if self._above >= 1:
            missed = (~self.there[experts]).sum(axis=1)
            may = self.there[None].repeat(count, axis=0)
            return Served(may, experts[:0, 0], missed, np.zeros_like(missed), self.there)
        shares = _shares(choice.weights)
        heavy = shares > self._above if self._above > 0 else np.ones_like(shares, dtype=bool)
        may = np.empty((count, len(self.there)), dtype=bool)
        missed, reads = np.empty(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        fetched: list[int] = []
        row = 0
        while row < count:
            stop = self._next(experts, heavy, row)
            missed[row:stop] = np.count_nonzero(~self.there[experts[row:stop]], axis=1)
            self._warm(experts[row:stop], shares[row:stop])
            may[row : stop - 1] = self.there
            last = experts[stop - 1]
            lacking = last[heavy[stop - 1] & ~self.there[last]].tolist()
            self._fetch(lacking, last)
            may[stop - 1], reads[stop - 1] = self.there, len(lacking)
            fetched += lacking
            row = stop
        return Served(may, np.array(fetched, dtype=np.int64), missed, reads, self.there)

    def _serve_one(self, experts: IntArray, weights: FloatArray) -> Served:
        """The same for one token, as decoding asks it all the time."""
        there = self.there[experts].tolist()
        missed = np.array([there.count(False)])
        if self._above >= 1:
            return Served(self.there[None], experts[:0], missed, _NONE, self.there)
        shares = weights.astype(np.float64)
        total = float(shares.sum())
        shares /= total if total > 0 else 1.0
        self._count(experts, shares)
        lacking = []
        if missed[0]:
            heavy = (shares > self._above).tolist() if self._above > 0 else [True] * len(there)
            known = zip(experts.tolist(), heavy, there, strict=True)
            lacking = [expert for expert, weighs, at_hand in known if weighs and not at_hand]
        if not lacking:
            return Served(self.there[None], experts[:0], missed, _NONE, self.there)
        self._fetch(lacking, experts)
        reads, order = np.array([len(lacking)]), np.array(lacking, dtype=np.int64)
        return Served(self.there[None], order, missed, reads, self.there)

    def _next(self, experts: IntArray, heavy: BoolArray, row: int) -> int:
        """One beyond the next token from `row` that fetches, or the end of a block without one."""
        end = row + _BLOCK
        lacking = np.asarray((heavy[row:end] & ~self.there[experts[row:end]]).any(axis=1))
        return row + (int(lacking.argmax()) + 1 if lacking.any() else len(lacking))

    def _fetch(self, lacking: list[int], needed: IntArray) -> None:
        """Let the coldest that this token does not need leave for each of `lacking`."""
        self.there = self.there.copy()
        for expert in lacking:
            idle = self.there.copy()
            idle[needed] = False
            leaving = int(np.where(idle, self._heat, np.inf).argmin())
            assert idle[leaving], "one token needs more experts than the layer has slots"
            self.there[leaving] = False
            self.there[expert] = True

    def _warm(self, experts: IntArray, shares: Shares) -> None:
        """Add what each token's router gave, the later the more, exactly as one by one.

        Instead of decaying all, gains grow; they and the heat are halved at once now and then,
        which rounds nothing.
        """
        while len(experts):
            count = min(len(experts), HALF_LIFE - self._clock)
            gains = _GAINS[self._clock : self._clock + count, None] * shares[:count]
            np.add.at(self._heat, experts[:count], gains)
            experts, shares = experts[count:], shares[count:]
            self._pass(count)

    def _count(self, experts: IntArray, shares: Shares) -> None:
        """The same for one token: [k] each."""
        np.add.at(self._heat, experts, _GAINS[self._clock] * shares)
        self._pass(1)

    def _pass(self, tokens: int) -> None:
        self._clock += tokens
        if self._clock == HALF_LIFE:
            self._heat *= 0.5
            self._clock = 0


def _shares(weights: FloatArray) -> Shares:
    """Each expert's part of its token's routing weight: [tokens, k]."""
    weights = weights.astype(np.float64)
    total = weights.sum(axis=1, keepdims=True)
    total[~(total > 0)] = 1.0
    return np.asarray(weights / total, dtype=np.float64)


class Books:
    """The books of all layers of one model, as one: what a pass decides counts if it succeeds.

    shape: (layers, experts). Nobody is in a slot before the first `place`.
    """

    def __init__(self, above: float, shape: tuple[int, int]) -> None:
        self.above, self._shape = above, shape
        self._books: dict[int, LayerBook] = {}
        self._before: dict[int, LayerBook] = {}  # of the layers that the running pass has changed
        self.astray = False  # whether the cache may stand elsewhere

    def place(self, there: BoolArray, popularity: Shares) -> None:
        """Begin anew with `there` [layers, experts], which the cache holds now.

        popularity: [layers, experts], or of a shape that broadcasts to it.
        """
        known = np.broadcast_to(popularity, there.shape)
        self._books = {
            layer: LayerBook(row, known[layer], self.above)
            for layer, row in enumerate(there)
            if row.any()
        }
        self._before.clear()
        self.astray = False

    def expect(self, popularity: Shares) -> None:
        """Other requests run: who is there stays, and who leaves first is known anew.

        popularity: as for `place`.
        """
        known = np.broadcast_to(popularity, self._shape)
        for layer, book in self._books.items():
            book.expect(known[layer])

    def serve(self, choice: Choice) -> Served:
        """Decide for a layer's tokens."""
        book = self._books[choice.layer]
        if self.above < 1 and choice.layer not in self._before:
            self._before[choice.layer] = book.copy()
        return book.serve(choice)

    def there(self) -> BoolArray:
        """Who is in a slot: [layers, experts]."""
        there = np.zeros(self._shape, dtype=bool)
        for layer, book in self._books.items():
            there[layer] = book.there
        return there

    def commit(self) -> None:
        """The pass succeeded."""
        self._before.clear()

    def abandon(self) -> None:
        """The pass failed: the books are as before it, and the cache may not be."""
        self.astray = self.astray or bool(self._before)
        self._books |= self._before
        self._before.clear()
