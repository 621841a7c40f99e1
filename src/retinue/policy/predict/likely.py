"""From what each token is likely to choose to what a layer is likely to need."""

import numpy as np

from retinue.types import FloatArray, Want


def chances(scores: FloatArray) -> FloatArray:
    """The sigmoid of scores, however large they are."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * scores)), dtype=np.float32)


def likely(layer: int, scores: FloatArray, count: int) -> Want:
    """The `count` best of each token, those with most in sum first.

    scores: [tokens, experts], none below 0.
    """
    experts = scores.shape[1]
    count = min(count, experts)
    if len(scores) == 1:
        weight = scores[0]
        best = (-weight).argsort(kind="stable")[:count]
        best = best[weight[best] > 0]
        return Want(layer, best, weight[best])
    chosen = np.argpartition(scores, experts - count, axis=1)[:, experts - count :]
    weight = np.zeros(experts, dtype=np.float32)
    np.add.at(weight, chosen, np.take_along_axis(scores, chosen, axis=1))
    order = np.argsort(-weight, kind="stable")[: np.count_nonzero(weight)]
    return Want(layer, order, weight[order])
