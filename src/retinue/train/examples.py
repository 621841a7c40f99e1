"""Texts as what the routers said of each of their tokens: what learned parts are made of.

Choices are kept of every token. Hidden states and scores are large, so they are kept of tokens
that are drawn evenly from each text, as many as fit into `LIMIT_BYTES` for all texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retinue.trace import Routed, TraceHead
from retinue.types import FloatArray, IntArray

LIMIT_BYTES = 256 << 20
Half = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Example:
    """One text. Rows are the layers with experts; an id of `experts` or more means none."""

    task: str | None
    prompt_tokens: int
    ids: IntArray | None  # [tokens], where they are known
    experts: IntArray  # [tokens, rows, k]
    weights: FloatArray  # [tokens, rows, k]
    embedding: FloatArray  # [hidden], the mean of the prompt's tokens'
    prompt_scores: FloatArray  # [rows, experts], the mean over the prompt's tokens
    drawn: IntArray  # [n], the tokens that the rest is of, ascending
    scores: Half  # [n, rows, experts], probabilities
    hidden: Half  # [n, rows, hidden], what each layer's router gets


@dataclass(frozen=True, slots=True)
class Drawn:
    """The drawn tokens of many texts, one after the other."""

    hidden: Half  # [n, rows, hidden]
    scores: Half  # [n, rows, experts]
    chosen: npt.NDArray[np.bool_]  # [n, rows, experts], which experts the router took


def room(head: TraceHead, texts: int) -> int:
    """How many tokens of each text may be drawn."""
    token = 2 * len(head.routed) * (head.width + head.experts)
    return max(2, LIMIT_BYTES // (token * max(texts, 1)))


def example_of(
    request: Routed, ids: Sequence[int] | None, most: int, random: np.random.Generator
) -> Example:
    """One request of a recording; of `most` tokens what is large is kept.

    ids: its tokens, where they are known. What of the signals was not recorded is empty.
    """
    assert request.experts is not None
    assert request.weights is not None
    tokens, rows, _ = request.experts.shape
    nothing = np.empty((tokens, rows, 0), np.float32)
    scores = request.signals.get("scores", nothing)
    hidden = request.signals.get("hidden", nothing)
    drawn = np.sort(random.permutation(tokens)[:most])
    return Example(
        request.task,
        request.prompt_tokens,
        None if ids is None else np.array(ids, dtype=np.int64),
        request.experts,
        request.weights.astype(np.float32),
        request.signals.get("embedding", nothing[0, 0]).astype(np.float32),
        scores[: request.prompt_tokens].mean(axis=0, dtype=np.float32),
        drawn,
        scores[drawn].astype(np.float16),
        _half(hidden[drawn]),
    )


def drawn_of(examples: Sequence[Example], experts: int) -> Drawn:
    """All drawn tokens of `examples`, of layers with `experts`."""
    chosen = [choices(one.experts[one.drawn], experts) for one in examples]
    return Drawn(
        np.concatenate([one.hidden for one in examples]),
        np.concatenate([one.scores for one in examples]),
        np.concatenate(chosen),
    )


def choices(experts: IntArray, count: int) -> npt.NDArray[np.bool_]:
    """`experts` [tokens, rows, k] as [tokens, rows, count], whether each one is among them."""
    found = np.zeros((*experts.shape[:2], count + 1), dtype=bool)
    np.put_along_axis(found, np.minimum(experts, count), True, axis=-1)
    return found[..., :count]


def _half(values: FloatArray) -> Half:
    """As fp16, of which a hidden state may be out of range."""
    most = float(np.finfo(np.float16).max)
    return np.clip(values, -most, most).astype(np.float16)
