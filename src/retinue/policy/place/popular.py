"""The most used experts of a profile stay: of all tasks together, or of the tasks that run.

By task as in eMoE (arXiv 2503.06823, section 4.2) with every layer sensitive and the profile's
popularity in place of a predictor's. Each request counts the same, whatever its length.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import BoolArray, Known, Running, Stock
from retinue.policy.place.even import even_rooms, most


class Popular:
    """One set for all tasks."""

    fixed = True
    needs_profile = True
    by_task = False
    periodic = False

    def place(self, stock: Stock, running: Sequence[Running], known: Known) -> BoolArray:
        """The most used experts of each layer over all tasks."""
        return most(known.shares(None), even_rooms(stock.slots, stock.there), stock.there)


class PopularByTask:
    """A set for the tasks that run: the sum of their shares decides."""

    fixed = True
    needs_profile = True
    by_task = True
    periodic = False

    def place(self, stock: Stock, running: Sequence[Running], known: Known) -> BoolArray:
        """The most used experts of each layer over the tasks; an unknown task counts as all."""
        total = np.zeros(stock.there.shape, dtype=np.float64)
        for task in [request.task for request in running] or [None]:
            total += known.shares(task)
        return most(total, even_rooms(stock.slots, stock.there), stock.there)
