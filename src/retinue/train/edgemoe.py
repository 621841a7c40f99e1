"""EdgeMoE's bit widths and its dictionary of paths (arXiv 2308.14352, sections 3.2 and 3.3).

Importance is the loss that is added when one expert alone is int2 and all others are int4. The
paper measures it, a pass over the texts for each expert. Here it is estimated: how far the int2
expert's output is from the int4 one's, squared, times the squared routing weight, over the tokens
that chose it, times the squared gradient of the loss by the layer's output (`model/whole.py`).

The two uniform widths that bracket the tolerated loss, 2 % of perplexity, are measured, and so is
K, the number of least important experts that get the lower one, by halving. Experts are rounded as
the nested store rounds them.

The dictionary goes by the heaviest expert of each of the two layers before, as the paper's models
choose one expert a token, and says how often each expert follows, whatever its rank.
"""

from collections.abc import Sequence

import numpy as np

from retinue.model.whole import AS_IS, WholeModel
from retinue.policy.preset import Arrays
from retinue.train.examples import Example, choices
from retinue.train.worth import Flags, top
from retinue.types import FloatArray, IntArray

TOLERATED = 0.02  # of perplexity
WIDTHS = (2, 4, 8, AS_IS)
PATHS = 8192  # the most frequent ones of all
WAYS = 2  # times as many experts as a token chooses are kept of each


def importance(whole: WholeModel, texts: Sequence[Sequence[int]]) -> FloatArray:
    """About what loss each expert adds in int2, in nats up to a common factor: [rows, experts]."""
    gradients = whole.squared_gradients(texts)
    return np.asarray(gradients[:, None] * whole.distances(texts, (4, 2)))


def widths(
    whole: WholeModel, texts: Sequence[Sequence[int]], importances: FloatArray
) -> FloatArray:
    """The bits of each expert, so that the texts' loss stays as tolerated: [rows, experts]."""
    limit = whole.loss(texts) + np.log1p(TOLERATED)

    def bears(bits: IntArray) -> bool:
        return bool(whole.loss(texts, bits) <= limit)

    shape = importances.shape
    enough = next(bits for bits in WIDTHS if bits == AS_IS or bears(np.full(shape, bits)))
    if enough == WIDTHS[0]:
        return np.full(shape, float(enough))
    lower = WIDTHS[WIDTHS.index(enough) - 1]
    order = np.argsort(importances, axis=None, kind="stable")

    def mixed(count: int) -> IntArray:
        bits = np.full(order.size, enough)
        bits[order[:count]] = lower
        return bits.reshape(shape)

    least, most = 0, order.size  # `least` is borne, `most` is not
    while most - least > max(1, order.size // 64):
        middle = (least + most) // 2
        least, most = (middle, most) if bears(mixed(middle)) else (least, middle)
    return mixed(least).astype(np.float32)


def dictionary(examples: Sequence[Example], experts: int, top_k: int) -> dict[str, FloatArray]:
    """The paths: `keys`, `ids`, `shares` and `anywhere` of kind `edgemoe`."""
    chosen = np.concatenate([choices(one.experts, experts) for one in examples])
    keys = np.concatenate([keys_of(one) for one in examples])
    rows = chosen.shape[1]
    found, at, seen = np.unique(
        keys.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    sums = np.zeros((len(found), experts), np.float32)
    np.add.at(sums, at.reshape(-1), chosen.reshape(-1, experts))
    kept = np.sort(np.argsort(-seen, kind="stable")[:PATHS])
    shares = sums[kept] / seen[kept, None]
    ids = np.argsort(-shares, axis=1, kind="stable")[:, : min(experts, WAYS * top_k)]
    shares = np.take_along_axis(shares, ids, axis=1)
    anywhere = chosen.mean(axis=0).reshape(rows, experts)
    ids = np.where(shares > 0, ids, -1)
    return {"keys": found[kept], "ids": ids, "shares": shares, "anywhere": anywhere}


def keys_of(example: Example) -> IntArray:
    """Of each token and row: the row, the heaviest expert two rows before, and one: -1 for none."""
    heaviest = np.take_along_axis(
        example.experts, example.weights.argmax(axis=-1)[..., None], axis=-1
    )[..., 0]
    before = np.pad(heaviest, ((0, 0), (2, 0)), constant_values=-1)
    rows = heaviest.shape[1]
    place = np.broadcast_to(np.arange(rows), heaviest.shape)
    return np.stack([place, before[:, :rows], before[:, 1 : rows + 1]], axis=-1)


def dictionary_names(arrays: Arrays, examples: Sequence[Example], top_k: int) -> Flags:
    """Which `top_k` experts of every token and row are named."""
    experts = arrays["anywhere"].shape[1]
    index = {tuple(key): at for at, key in enumerate(arrays["keys"].astype(np.int64).tolist())}
    keys = np.concatenate([keys_of(one) for one in examples])
    scores = np.broadcast_to(arrays["anywhere"] * 1e-3, (*keys.shape[:2], experts)).copy()
    at = np.array([index.get(tuple(key), -1) for key in keys.reshape(-1, 3).tolist()])
    known, flat = np.flatnonzero(at >= 0), scores.reshape(-1, experts)
    ids = arrays["ids"].astype(np.int64)[at[known]]
    shares = np.where(ids >= 0, arrays["shares"][at[known]], -1)
    valid = shares >= 0
    rows = np.broadcast_to(known[:, None], ids.shape)
    flat[rows[valid], ids[valid]] += shares[valid]
    return top(flat.reshape(scores.shape), top_k)
