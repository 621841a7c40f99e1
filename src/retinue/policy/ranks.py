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
    own = np.where(experts < count, np.maximum(weights, 0), 0).astype(np.float32)
    whole = own.sum(axis=1, keepdims=True)
    return np.asarray(own / np.where(whole > 0, whole, 1), dtype=np.float32)


def before(part: FloatArray) -> FloatArray:
    """The sum of the parts that rank above each one: [tokens, k], 0 for a token's first.

    HOBBIT's score s_i (arXiv 2411.01433, section 3.2). Of ties the first ranks higher.
    """
    order = each_row(len(part)), (-part).argsort(axis=1, kind="stable")
    ranked = part[order]
    sums = np.minimum(ranked.cumsum(axis=1) - ranked, 1)
    found = np.empty_like(part)
    found[order] = np.maximum(sums, 0)
    return found
