"""Makes a whole set of experts resident, at once or while others compute."""

from collections.abc import Callable

import numpy as np

from retinue.errors import Cancelled
from retinue.memory.base import WAIT_S
from retinue.memory.cache import ExpertCache
from retinue.policy.base import BoolArray
from retinue.types import Expert


def place(cache: ExpertCache, wanted: BoolArray, stop: Callable[[], bool] = lambda: False) -> int:
    """Make exactly `wanted` [layers, experts] resident; returns the bytes that were read.

    Raises the error of a read, and Cancelled soon after `stop` says so, with a part there.
    """
    lacking = start(cache, wanted, stop)
    _finish(cache, stop)
    cache.reads.raise_any()
    return sum(int(cache.sizes.read_bytes[0][expert]) for expert in lacking)


def start(
    cache: ExpertCache, wanted: BoolArray, stop: Callable[[], bool] = lambda: False
) -> list[Expert]:
    """Let go of all but `wanted` [layers, experts] and read what is lacking, in layer order.

    Returns who that is. Raises Cancelled soon after `stop` says so.
    """
    cache.cancel_all()
    _finish(cache, stop)
    cache.let_go(_named(cache.ready & ~wanted))
    lacking = _named(wanted & ~cache.ready)
    assert len(lacking) <= cache.spare, "more experts are wanted than slots"
    with cache.reads.placing():
        cache.read(lacking)
    return lacking


def _named(experts: BoolArray) -> list[Expert]:
    """Those that `experts` [layers, experts] says, in layer order."""
    return [Expert(layer, index) for layer, index in np.argwhere(experts).tolist()]


def _finish(cache: ExpertCache, stop: Callable[[], bool]) -> None:
    while cache.reads.loading or cache.reads.draining:
        if stop():
            cache.cancel_all()
            raise Cancelled("the request was cancelled")
        cache.wait(WAIT_S)
