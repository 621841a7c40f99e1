"""Which experts each request has used, and which earlier request it resembles.

MoE-Infinity (arXiv 2401.14361): an expert activation matrix (EAM) counts for a
request the tokens that went to each expert of each layer; a collection of them (EAMC) is matched
against the request that runs by the cosine of their rows. Deviations: the match is brought up to
date after each layer, not once an iteration, and goes by the layers that the request has counts
of; a new matrix takes the place of the one most like it, as in the paper, where the code takes the
one used least.
"""

import numpy as np

from retinue.policy.base import Prompt, Signal, View
from retinue.policy.watch.seats import Seats, grown
from retinue.types import Demand, FloatArray

CAPACITY = 1000  # as in the authors' code; the paper has 120 to 1000


class Activations:
    """The matrices of the requests that run, and the collection, which grows with those that end.

    matrices: [kept, layers, experts], of requests that came before; any multiple of a row will do.
    capacity: how many the collection holds; it keeps more if it is given more.
    """

    needs: frozenset[Signal] = frozenset()

    def __init__(self, matrices: FloatArray, capacity: int = CAPACITY) -> None:
        self.size, layers, experts = matrices.shape
        self._experts, self._seats = experts, Seats()
        self.capacity = max(capacity, self.size)
        # Each row is of length one, so that products with it are cosines; by layer first.
        self._rows = np.zeros((layers, self.capacity, experts), np.float32)
        self._shares = np.zeros((self.capacity, layers, experts), np.float32)
        for entry, matrix in enumerate(matrices):
            self._put(entry, matrix)
        self._counts = np.zeros((0, layers, experts), np.float32)  # [seats, ...]
        # [seats, layers, entries]: cosines, and [seats, entries]: their sums over layers.
        self._likeness = np.zeros((0, layers, self.capacity), np.float32)
        self._similarity = np.zeros((0, self.capacity), np.float32)
        self._running = np.zeros(0, dtype=np.int64)  # seats of the pass that runs

    def begin(self, prompt: Prompt) -> None:
        """An empty matrix for the request."""
        seat = self._seats.take(prompt.sequence)
        self._counts = grown(self._counts, seat + 1)
        self._likeness = grown(self._likeness, seat + 1)
        self._similarity = grown(self._similarity, seat + 1)
        self._counts[seat], self._likeness[seat], self._similarity[seat] = 0, 0, 0

    def observe(self, demand: Demand, view: View) -> None:
        """Count what each request uses, and compare its row of this layer with the collection."""
        route = view.route
        if route is None:
            return
        layer, experts = demand.layer, route.experts
        tokens = self._seats.of(route.sequences)
        known = tokens >= 0
        if not known.all():
            experts, tokens = experts[known], tokens[known]
        self._running = seats = tokens if len(tokens) == 1 else np.unique(tokens)
        there = experts < self._experts
        if len(tokens) == 1:
            self._counts[tokens[0], layer, experts[there]] += 1
        else:
            owners = np.broadcast_to(tokens[:, None], experts.shape)
            np.add.at(self._counts[:, layer], (owners[there], experts[there]), 1)
        if self.size and len(seats):
            counts = _unit(self._counts[seats, layer])  # [seats, experts]
            found = counts @ self._rows[layer, : self.size].T
            self._similarity[seats, : self.size] += (
                found - self._likeness[seats, layer, : self.size]
            )
            self._likeness[seats, layer, : self.size] = found

    def end(self, sequence: int) -> None:
        """The matrix of a request that has ended joins the collection."""
        seat = self._seats.leave(sequence)
        if seat is None:
            return
        matrix = self._counts[seat]
        if matrix.any():
            full = self.size == self.capacity
            entry = int(self._similarity[seat].argmax()) if full else self.size
            self.size += not full
            self._put(entry, matrix)
            # Of requests that run: compared anew from now on.
            self._likeness[:, :, entry], self._similarity[:, entry] = 0, 0
        self._running = self._running[self._running != seat]

    @property
    def counts(self) -> FloatArray:
        """Tokens of the requests in the last pass, so far: [layers, experts]."""
        return np.asarray(self._counts[self._running].sum(axis=0))

    @property
    def requests(self) -> int:
        """How many requests the last pass was for."""
        return len(self._running)

    def expected(self) -> FloatArray | None:
        """Shares of the matrices nearest to those of the last pass's requests, summed.

        [layers, experts], each layer's sum is the number of requests; None: nothing to go by.
        """
        if not self.size or not len(self._running):
            return None
        nearest = self._similarity[self._running, : self.size].argmax(axis=1)
        if len(nearest) == 1:
            return np.asarray(self._shares[nearest[0]])
        return np.asarray(self._shares[nearest].sum(axis=0))

    def _put(self, entry: int, matrix: FloatArray) -> None:
        self._rows[:, entry] = _unit(matrix)
        whole = matrix.sum(axis=1, keepdims=True)
        self._shares[entry] = matrix / np.where(whole > 0, whole, 1)


def _unit(rows: FloatArray) -> FloatArray:
    """Rows of length one, or of zeros."""
    length = np.sqrt((rows * rows).sum(axis=-1, keepdims=True))
    return np.asarray(rows / np.where(length > 0, length, 1), dtype=np.float32)
