"""Makes a whole set of experts resident, at once or while others compute."""

from collections.abc import Callable

import numpy as np

from retinue.errors import Cancelled
from retinue.memory.base import WAIT_S
from retinue.memory.cache import ExpertCache
from retinue.policy.base import BoolArray


def place(cache: ExpertCache, wanted: BoolArray, stop: Callable[[], bool] = lambda: False) -> int:
    """Make exactly `wanted` [layers, experts] resident; returns the bytes that were read.

    Raises the error of a read, and Cancelled soon after `stop` says so, with a part there.
    """
    lacking = start(cache, wanted, stop)
    _finish(cache, stop)
    cache.reads.raise_any()
    return int(cache.sizes.read_bytes[0][lacking].sum())


def start(
    cache: ExpertCache, wanted: BoolArray, stop: Callable[[], bool] = lambda: False
) -> BoolArray:
    """Let go of all but `wanted` [layers, experts] and read what is lacking, in layer order.

    Returns who that is: [layers, experts]. Raises Cancelled soon after `stop` says so.
    """
    cache.cancel_all()
    _finish(cache, stop)
    for layer, row in enumerate(wanted):
        cache.let_go(layer, np.flatnonzero(~row))
    lacking: BoolArray = wanted & ~cache.ready
    assert np.count_nonzero(lacking) <= cache.spare, "more experts are wanted than slots"
    with cache.reads.placing():
        for layer, row in enumerate(lacking):
            cache.read(layer, np.flatnonzero(row))
    return lacking


def _finish(cache: ExpertCache, stop: Callable[[], bool]) -> None:
    while cache.reads.loading or cache.reads.draining:
        if stop():
            cache.cancel_all()
            raise Cancelled("the request was cancelled")
        cache.wait(WAIT_S)
