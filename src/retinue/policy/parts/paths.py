"""Routing paths from token ids alone (ExpertFlow, arXiv 2410.17954): kind `expertflow`.

The paper's predictor is a T5-like encoder-decoder of width 32 that reads a whole sequence. Ours
reads a token, the one before it, and a mean of all before that in which older ones fade: as cheap
for one more token as for the first, so that it can run while a model decodes. The heads are the
same: scores of every layer's experts, each by itself, before a sigmoid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retinue.policy.preset import Arrays
from retinue.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Context:
    """What a sequence was so far: the last token's embedding, and the fading mean: [wide] each."""

    last: FloatArray
    mean: FloatArray


def fresh(arrays: Arrays) -> Context:
    """Before the first token."""
    nothing = np.zeros(arrays["embed"].shape[1], np.float32)
    return Context(nothing, nothing)


def paths(arrays: Arrays, context: Context, ids: IntArray) -> tuple[FloatArray, Context]:
    """Scores of the experts that tokens `ids` will need, [tokens, rows, experts], and what follows.

    An id that was not in the vocabulary of the training counts as the last one there.
    """
    embed, decay = arrays["embed"], float(arrays["decay"][0])
    own = embed[np.minimum(ids, len(embed) - 1)]
    before, means = np.empty_like(own), np.empty_like(own)
    last, mean = context.last, context.mean
    for at, row in enumerate(own):
        before[at], means[at] = last, mean
        last, mean = row, decay * mean + (1 - decay) * row
    return _said(arrays, own, before, means), Context(last, mean)


def together(
    arrays: Arrays, contexts: Sequence[Context], ids: IntArray
) -> tuple[FloatArray, list[Context]]:
    """The same for one token of each of several sequences: scores [sequences, rows, experts]."""
    embed, decay = arrays["embed"], float(arrays["decay"][0])
    own = embed[np.minimum(ids, len(embed) - 1)]
    before = np.stack([context.last for context in contexts])
    means = np.stack([context.mean for context in contexts])
    scores = _said(arrays, own, before, means)
    later = decay * means + (1 - decay) * own
    return scores, [Context(*both) for both in zip(own, later, strict=True)]


def _said(arrays: Arrays, own: FloatArray, before: FloatArray, means: FloatArray) -> FloatArray:
    mix = arrays["mix"]
    inner = own @ mix[0] + before @ mix[1] + means @ mix[2] + arrays["mix_bias"]
    said = np.einsum("tw,rwe->tre", np.maximum(inner, 0), arrays["say"], optimize=True)
    return np.asarray(said + arrays["say_bias"])
