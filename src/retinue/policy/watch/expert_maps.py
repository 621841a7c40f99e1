"""What routers said in each pass of each request, and which stored pass it resembles.

fMoE (arXiv 2502.05370; FineMoE in its last version): an expert map holds the
probabilities of all experts of all layers in one iteration. The store keeps maps with the embedding
of their prompt. For the first d layers the map whose embedding is nearest says what comes, later
the one whose layers so far are nearest to those of this pass, both by cosine. A full store replaces
the entry most like the new one, by d/L * (cosine of embeddings) + (L - d)/L * (cosine of maps).
Deviations: a prefill pass has one map, the mean of its tokens; the search runs in the engine's
thread, as it is one product of a matrix and a vector for each layer; and coming layers that were
foreseen before are foreseen anew with what is known since.
"""

import numpy as np

from retinue.policy.base import Prompt, Signal, View
from retinue.policy.watch.seats import Seats, grown
from retinue.types import Demand, FloatArray, IntArray

CAPACITY = 1000
DISTANCE = 3  # d; the paper has 3 for Mixtral, 4 for Phi-3.5-MoE, 6 for Qwen1.5-MoE


class ExpertMaps:
    """The store, and the maps of the pass that runs.

    maps: [kept, layers, experts], the routers' probabilities in passes that came before.
    embeddings: [kept, hidden], of their prompts, of any length. capacity: how many maps the store
    holds; it keeps more if it is given more.
    """

    needs: frozenset[Signal] = frozenset({"scores", "embedding"})

    def __init__(
        self,
        maps: FloatArray,
        embeddings: FloatArray,
        capacity: int = CAPACITY,
        distance: int = DISTANCE,
    ) -> None:
        self.size, layers, experts = maps.shape
        self._seats, self.distance = Seats(), distance
        self.capacity = max(capacity, self.size)
        self._maps = np.zeros((layers, self.capacity, experts), np.float32)  # by layer first
        self._lengths = np.zeros((layers, self.capacity), np.float32)  # squared, layers so far
        self._embeddings = np.zeros((self.capacity, embeddings.shape[1]), np.float32)
        for entry, (one, embedding) in enumerate(zip(maps, embeddings, strict=True)):
            self._put(entry, one, _unit(embedding))
        self._own = np.zeros((0, layers, experts), np.float32)  # [seats, ...]: of this pass
        self._own_embeddings = self._embeddings[:0]
        self._meant = np.zeros((0, self.capacity), np.float32)  # cosines of embeddings
        self._products = np.zeros((0, self.capacity), np.float32)  # with maps, layers so far
        self._squares = np.zeros(0, np.float32)  # of the own map, layers so far
        self._running = np.zeros(0, dtype=np.int64)
        self._step, self._seen = -1, 0  # layers of this pass
        self._followed: dict[int, tuple[IntArray, FloatArray]] = {}  # until something changes
        self.used = np.zeros((layers, experts), np.int64)  # in how many passes

    def begin(self, prompt: Prompt) -> None:
        """Compare the request's embedding with those of the store."""
        seat = self._seats.take(prompt.sequence)
        self._own = grown(self._own, seat + 1)
        self._own_embeddings = grown(self._own_embeddings, seat + 1)
        self._meant = grown(self._meant, seat + 1)
        self._products = grown(self._products, seat + 1)
        self._squares = grown(self._squares, seat + 1)
        self._forget(np.array([seat]))
        self._own_embeddings[seat], self._meant[seat] = 0, 0
        self._followed.clear()
        if prompt.embedding is not None:
            self._own_embeddings[seat] = _unit(prompt.embedding)
            self._meant[seat] = self._embeddings @ self._own_embeddings[seat]

    def observe(self, demand: Demand, view: View) -> None:
        """Add this layer to each request's map; the first one ends the maps of the pass before."""
        route = view.route
        self._followed.clear()
        if view.step != self._step:
            self._store(self._running)
            self._step, self._seen, self._running = view.step, 0, self._running[:0]
        self._seen += 1
        self.used[demand.layer, demand.experts] += 1
        if route is None or route.scores is None:
            return
        tokens = self._seats.of(route.sequences)
        self._running = seats = np.unique(tokens[tokens >= 0])
        one = len(tokens) == len(seats) == 1
        means = route.scores if one else _means(route.scores, tokens, seats)
        self._own[seats, demand.layer] = means
        self._products[seats] += means @ self._maps[demand.layer].T
        self._squares[seats] += (means * means).sum(axis=1)

    def end(self, sequence: int) -> None:
        """Store the request's last map."""
        seat = self._seats.leave(sequence)
        if seat is not None:
            self._store(self._running[self._running == seat])
            self._running = self._running[self._running != seat]
            self._followed.clear()

    def meant(self) -> tuple[IntArray, FloatArray]:
        """By embedding, for each request of the pass: the nearest entry, and its cosine."""
        return _nearest(self._meant[self._running, : self.size])

    def followed(self, layer: int) -> tuple[IntArray, FloatArray]:
        """By the layers up to `layer`, the one that ran last: the nearest entry, and its cosine."""
        if layer not in self._followed:
            self._followed[layer] = _nearest(self._cosines(self._running, layer))
        return self._followed[layer]

    def foresees(self, ahead: int) -> bool:
        """Whether the layer `ahead` of the last one has layers enough before it to go by."""
        return self._seen + ahead > self.distance

    def rows(self, layer: int, entries: IntArray) -> FloatArray:
        """`layer` in the maps of `entries`: [entries, experts]."""
        return np.asarray(self._maps[layer, entries])

    def means(self, entries: IntArray, layers: IntArray, experts: IntArray) -> FloatArray:
        """Of the mean of the maps of `entries`: [n], as many as `layers` and `experts`."""
        if len(entries) == 1:
            return np.asarray(self._maps[layers, entries[0], experts])
        return np.asarray(self._maps[:, entries].mean(axis=1)[layers, experts])

    def _cosines(self, seats: IntArray, layer: int) -> FloatArray:
        """Of the maps up to `layer`: [seats, entries]."""
        lengths = self._lengths[layer, : self.size] * self._squares[seats, None]
        return np.asarray(self._products[seats, : self.size] / np.sqrt(np.maximum(lengths, 1e-12)))

    def _store(self, seats: IntArray) -> None:
        """Put away the maps of a pass, and make room for those of the next one."""
        last = len(self._lengths) - 1
        part = min(1.0, self.distance / max(1, self._seen))
        for seat in seats.tolist():
            if not self._squares[seat]:
                continue
            entry = self.size
            if self.size == self.capacity:
                alike = (1 - part) * self._cosines(np.array([seat]), last)[0]
                entry = int((alike + part * self._meant[seat]).argmax())
            else:
                self.size += 1
            self._put(entry, self._own[seat], self._own_embeddings[seat])
            self._meant[:, entry] = self._own_embeddings @ self._own_embeddings[seat]
            self._products[:, entry] = 0  # of requests that run: unlike it until their next pass
        self._forget(seats)

    def _forget(self, seats: IntArray) -> None:
        self._own[seats], self._products[seats], self._squares[seats] = 0, 0, 0

    def _put(self, entry: int, one: FloatArray, embedding: FloatArray) -> None:
        self._maps[:, entry] = one
        self._lengths[:, entry] = np.cumsum((one * one).sum(axis=1))
        self._embeddings[entry] = embedding


def _means(scores: FloatArray, tokens: IntArray, seats: IntArray) -> FloatArray:
    """The mean of each seat's rows of `scores` [tokens, experts]: [seats, experts]."""
    mine = (seats[:, None] == tokens).astype(np.float32)
    return np.asarray(mine @ scores / mine.sum(axis=1, keepdims=True))


def _nearest(cosines: FloatArray) -> tuple[IntArray, FloatArray]:
    if not cosines.size:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    best = cosines.argmax(axis=1)
    return best, np.asarray(cosines[np.arange(len(best)), best])


def _unit(row: FloatArray) -> FloatArray:
    """`row` with length one; all 0 stays so."""
    length = float(np.sqrt(row @ row))
    return np.asarray(row / length if length else row, dtype=np.float32)
