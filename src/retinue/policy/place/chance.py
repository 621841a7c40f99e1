"""A set drawn by chance: what a placement that knows nothing is worth."""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import BoolArray, Known, Running, Stock
from retinue.policy.place.even import even_rooms, most


class Chance:
    """The same draw for the same seed and shape."""

    fixed = True
    needs_profile = False
    by_task = False
    periodic = False

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def place(self, stock: Stock, running: Sequence[Running], known: Known) -> BoolArray:
        """As many experts of each layer as it has room for, each as likely as any other."""
        drawn = np.random.default_rng(self._seed).random(stock.there.shape)
        return most(drawn, even_rooms(stock.slots, stock.there), stock.there)
