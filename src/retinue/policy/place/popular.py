"""The most used experts of a profile stay: of all tasks together, or of the tasks that run.

By task as in eMoE (arXiv 2503.06823, section 4.2) with every layer sensitive and the profile's
popularity in place of a predictor's. Each request counts the same, whatever its length.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from retinue.policy.base import BoolArray, Popularity
from retinue.types import IntArray


class Popular:
    """One set for all tasks."""

    fixed = True
    needs_profile = True
    by_task = False

    def place(
        self, rooms: IntArray, there: BoolArray, tasks: Sequence[str | None], known: Popularity
    ) -> BoolArray:
        """The most used experts of each layer over all tasks."""
        return most(known.shares(None), rooms, there)


class PopularByTask:
    """A set for the tasks that run: the sum of their shares decides."""

    fixed = True
    needs_profile = True
    by_task = True

    def place(
        self, rooms: IntArray, there: BoolArray, tasks: Sequence[str | None], known: Popularity
    ) -> BoolArray:
        """The most used experts of each layer over `tasks`; an unknown task counts as all."""
        total = np.zeros(there.shape, dtype=np.float64)
        for task in tasks or [None]:
            total += known.shares(task)
        return most(total, rooms, there)


def most(scores: npt.NDArray[np.float64], rooms: IntArray, there: BoolArray) -> BoolArray:
    """The `rooms[layer]` highest of `there` in each layer, the first of ties."""
    chosen = np.zeros_like(there)
    order = np.argsort(-np.where(there, scores, -np.inf), axis=1, kind="stable")
    for layer, room in enumerate(rooms.tolist()):
        chosen[layer, order[layer, :room]] = True
    return chosen & there
