"""The same number of experts stays in every layer; the first layers take what is left."""

import numpy as np
import numpy.typing as npt

from retinue.policy.base import BoolArray, Stock
from retinue.types import IntArray


def even_rooms(slots: int, there: BoolArray) -> IntArray:
    """Split `slots` over the layers that have experts: `[layers]`.

    there: [layers, experts], which experts exist.
    """
    counts = there.sum(axis=1)
    layers = np.flatnonzero(counts)
    share, rest = divmod(slots, max(len(layers), 1))
    rooms = np.zeros(len(counts), dtype=np.int64)
    rooms[layers] = share
    rooms[layers[:rest]] += 1
    return np.asarray(np.minimum(rooms, counts), dtype=np.int64)


def even_split(scores: npt.NDArray[np.float64], stock: Stock) -> BoolArray:
    """In each layer as many of the highest scores as it has room for. `scores` [layers, experts].

    Of ties what is resident, then the first.
    """
    return most(scores, even_rooms(stock.slots, stock.there), stock.there, stock.resident)


def most(
    scores: npt.NDArray[np.float64],
    rooms: IntArray,
    there: BoolArray,
    resident: BoolArray | None = None,
) -> BoolArray:
    """The `rooms[layer]` highest of `there` in each layer; of ties what is `resident`."""
    absent = np.zeros_like(there) if resident is None else ~resident
    order = np.lexsort((absent, -np.where(there, scores, -np.inf)), axis=1)
    chosen = np.zeros_like(there)
    for layer, room in enumerate(rooms.tolist()):
        chosen[layer, order[layer, :room]] = True
    return chosen & there
