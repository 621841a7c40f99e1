"""Farthest next use: who leaves is who is needed last, which nobody can do better who cannot wait.

Belady's MIN (L. A. Belady, IBM Systems Journal 5(2), 1966), as Read-ME (arXiv 2410.19123, section
4.2) uses it on routes that are known ahead: the victim is the expert whose next use lies farthest
in the future. It needs the future, so that only a replay can run it. Deviation: a pass is one use
of all that it needs in a layer, since these must be there together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retinue.policy.base import Prompt, Signal, View
from retinue.types import Demand, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Future:
    """What will be needed, turn by turn; a turn is one layer of one pass.

    `after` says for each use, turn by turn and there in the demand's order, in which turn the same
    expert is used next; `starts` [turns + 1] where each turn's uses begin. `first` [layers,
    experts] is the first turn that uses each expert. The number of turns stands for never.
    """

    first: IntArray
    starts: IntArray
    after: IntArray


def future_of(demands: Sequence[Demand], layers: int, experts: int) -> Future:
    """What `demands`, in the order in which they come, say of the future."""
    turns = len(demands)
    sizes = np.array([len(demand.experts) for demand in demands], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    turn = np.repeat(np.arange(turns), sizes)
    layer = np.repeat(np.array([demand.layer for demand in demands], dtype=np.int64), sizes)
    empty = np.zeros(0, dtype=np.int64)
    used = np.concatenate([empty, *(demand.experts for demand in demands)])
    key = layer * experts + used
    order = np.argsort(key, kind="stable")  # by expert, and within one by turn
    begins = np.diff(key[order], prepend=-1) != 0
    following = np.append(turn[order][1:], turns)
    following[np.append(begins[1:], True)[: len(order)]] = turns  # the last use of its expert
    after = np.empty_like(turn)
    after[order] = following[: len(order)]
    first = np.full(layers * experts, turns, dtype=np.int64)
    first[key[order][begins]] = turn[order][begins]
    return Future(first.reshape(layers, experts), starts, after)


class Belady:
    """The oracle, an evictor and the watcher that tells it which turn it is."""

    needs: frozenset[Signal] = frozenset()

    def __init__(self, future: Future) -> None:
        self._future, self._next, self._turn = future, future.first.copy(), -1

    def begin(self, prompt: Prompt) -> None:
        """Nothing to learn."""

    def observe(self, demand: Demand, view: View) -> None:
        """The next turn has come: what it uses is used next later."""
        self._turn += 1
        start, stop = self._future.starts[self._turn : self._turn + 2]
        self._next[demand.layer, demand.experts] = self._future.after[start:stop]

    def end(self, sequence: int) -> None:
        """Nothing to forget."""

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """Minus the turns until the next use."""
        # Relative to now: float32 could not tell turns of a long trace apart.
        away = self._next[layers, experts] - self._turn
        return np.asarray(-away, dtype=np.float32)
