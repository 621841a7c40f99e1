"""A set drawn by chance: what a placement that knows nothing is worth."""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import BoolArray, Popularity
from retinue.policy.place.popular import most
from retinue.types import IntArray


class Chance:
    """The same draw for the same seed and shape."""

    fixed = True
    needs_profile = False
    by_task = False

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def place(
        self, rooms: IntArray, there: BoolArray, tasks: Sequence[str | None], known: Popularity
    ) -> BoolArray:
        """As many experts of each layer as it has room for, each as likely as any other."""
        return most(np.random.default_rng(self._seed).random(there.shape), rooms, there)
