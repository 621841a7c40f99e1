"""Makes a whole set of experts resident, between passes."""

import numpy as np

from retinue.memory.cache import ExpertCache
from retinue.policy.base import BoolArray


def place(cache: ExpertCache, wanted: BoolArray) -> int:
    """Make exactly `wanted` [layers, experts] resident; returns the bytes that were read.

    Raises the error of a read that failed.
    """
    cache.cancel_all()
    while cache.reads.draining:
        cache.wait(1.0)
    for layer, row in enumerate(wanted):
        cache.let_go(layer, np.flatnonzero(~row))
    read_bytes = 0
    for layer, row in enumerate(wanted & ~cache.ready):
        left = cache.read(layer, np.flatnonzero(row))
        assert not len(left), "more experts are wanted than there are slots"
        read_bytes += cache.read_bytes(layer, np.flatnonzero(row))
    while cache.reads.loading:
        cache.wait(1.0)
    cache.unask()
    cache.reads.raise_any()
    return read_bytes
