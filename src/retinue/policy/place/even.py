"""How many experts of each layer stay: the same for all, the first layers take what is left."""

import numpy as np

from retinue.policy.base import BoolArray
from retinue.types import IntArray


def even_rooms(slots: int, there: BoolArray) -> IntArray:
    """Split `slots` over the layers that have experts: `[layers]`.

    there: [layers, experts], which experts exist.
    """
    counts = there.sum(axis=1)
    layers = np.flatnonzero(counts)
    share, rest = divmod(slots, len(layers))
    rooms = np.zeros(len(counts), dtype=np.int64)
    rooms[layers] = share
    rooms[layers[:rest]] += 1
    return np.asarray(np.minimum(rooms, counts), dtype=np.int64)
