"""The ranks of a token's experts: what each adds to those that the router preferred to it."""

from functools import lru_cache

import numpy as np

from retinue.types import FloatArray, IntArray


@lru_cache(maxsize=8)
def each_row(count: int) -> IntArray:
    """0 to `count` in a column, to index rows with `[count, k]` beside it.

    `take_along_axis` does the same in four times the time, which is all there is where one token
    decodes.
    """
    return np.arange(count)[:, None]


def shares(experts: IntArray, weights: FloatArray, count: int) -> FloatArray:
    """Each chosen expert's part of its token's routing weight: [tokens, k].

    Ids of `count` or more mean none, and have no part.
    """
    own: FloatArray = np.maximum(weights, np.float32(0))
    none = experts >= count
    if none.any():
        own[none] = 0
    if len(own) == 1:  # one token decodes, where each call of numpy counts
        whole = np.add.reduce(own[0])
        return own / whole if whole > 0 else own
    sums = own.sum(axis=1, keepdims=True)
    return np.asarray(own / np.where(sums > 0, sums, 1), dtype=np.float32)


def before(part: FloatArray) -> FloatArray:
    """The sum of the parts that rank above each one: [tokens, k], 0 for a token's first.

    HOBBIT's score s_i (arXiv 2411.01433, section 3.2). Of ties the first ranks higher.
    """
    if len(part) == 1:
        return _before_one(part[0])[None]
    order = each_row(len(part)), (-part).argsort(axis=1, kind="stable")
    ranked = part[order]
    sums = np.minimum(ranked.cumsum(axis=1) - ranked, 1)
    found = np.empty_like(part)
    found[order] = np.maximum(sums, 0)
    return found


def _before_one(part: FloatArray) -> FloatArray:
    """The same of one token: [k]."""
    order = (-part).argsort(kind="stable")
    ranked = part[order]
    sums = ranked.cumsum()
    sums -= ranked
    found = np.empty_like(part)
    found[order] = np.maximum(np.minimum(sums, 1, out=sums), 0, out=sums)
    return found
