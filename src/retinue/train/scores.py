"""How well forecasters do on texts that nobody has learnt from, in the order of a stream.

Before each text a forecaster is asked for its task, after it told what the prompt used. Judged is
the text's answer, the part that a fixed set of experts serves token by token, and the only part
that all can forecast: `own-prefill` has seen the prompt by then.

An expert counts as used by an answer where it took at least an equal share of a layer's routing
weight, one over the number of experts; a forecaster names those that it gives as much. Coverage is
the share of the answer's routing weight that falls on the experts with the highest forecasts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retinue.policy.base import Forecaster
from retinue.policy.predict.own_prefill import OwnPrefill
from retinue.policy.predict.shares import Shares, shares_of
from retinue.train.texts import RoutedText
from retinue.types import FloatArray, IntArray

RESIDENT = (0.2, 0.4, 0.6, 0.8)  # shares of the experts at which coverage is said


@dataclass(frozen=True, slots=True)
class Score:
    """Precision, recall and F1 by layer with experts, over all texts; and coverage, as RESIDENT."""

    precision: FloatArray  # [layers with experts]
    recall: FloatArray
    f1: FloatArray
    covered: tuple[float, ...]


def score(made: Forecaster, stream: Sequence[RoutedText], rows: IntArray) -> Score:
    """Run `made` along `stream`; `rows` are the layers with experts."""
    forecasts, answers = [], []
    for text in stream:
        said = made.shares(text.task)
        if isinstance(made, OwnPrefill):
            said = made.own(text.task, text.prompt)
        made.observe(text.task, text.prompt)
        forecasts.append(said[rows])
        answers.append(shares_of(text.answer)[rows])
    return score_shares(np.stack(forecasts), np.stack(answers))


def score_shares(forecasts: Shares, used: Shares) -> Score:
    """The score of forecasts [texts, layers, experts] for what was used."""
    equal = 1 / used.shape[-1]
    named, needed = forecasts >= equal, used >= equal
    right = (named & needed).sum(axis=(0, 2))
    precision = right / np.maximum(named.sum(axis=(0, 2)), 1)
    recall = right / np.maximum(needed.sum(axis=(0, 2)), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    order = np.argsort(-forecasts, axis=-1, kind="stable")
    reached = np.take_along_axis(used, order, axis=-1).cumsum(axis=-1).mean(axis=(0, 1))
    counts = [max(1, round(share * used.shape[-1])) for share in RESIDENT]
    return Score(precision, recall, f1, tuple(float(reached[count - 1]) for count in counts))
