"""Every how many prompts a resident set is worth choosing anew, from recorded routing alone."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from retinue.policy.base import BoolArray
from retinue.policy.measured import Periods
from retinue.types import FloatArray

PERIODS = (1, 5, 10, 20, 40, 80)
SHARE = 0.4  # of each layer's experts that are resident
REFRESHES = 4  # that a period takes among the prompts, at least, to be judged
TOLERANCE = 0.01  # of the routing weight, more than with a set for every prompt

Prompt = tuple[str | None, FloatArray]  # a task, and the weight of each expert [layers, experts]
_Turn = tuple[str | None, FloatArray, BoolArray]  # and which experts its set would have


def measure_periods(prompts: Sequence[Prompt], top_k: int) -> Periods:
    """What a set of `SHARE` of the experts degrades that is chosen anew every n prompts.

    At every n-th prompt the set of each task becomes the most used experts of its last prompt, and
    stays until the next, as in eMoE (arXiv 2503.06823, section 4.2). Deviation: the paper looks at
    perplexity; the weight outside of the set stands in for it, so no model runs. The tasks take
    turns, since a file of texts has no order of its own.
    """
    stream = _take_turns(prompts, top_k)
    degraded = {}
    for period in PERIODS:
        lost, whole = np.sum([_replay(stream, period, phase) for phase in range(period)], axis=0)
        if whole and period * REFRESHES <= len(stream):
            degraded[period] = float(lost / whole)
    return Periods(len(stream), TOLERANCE, degraded)


def _take_turns(prompts: Sequence[Prompt], top_k: int) -> list[_Turn]:
    by_task: dict[str | None, list[FloatArray]] = {}
    for task, used in prompts:
        by_task.setdefault(task, []).append(used)
    stream = []
    for turn in zip_longest(*by_task.values()):
        for task, used in zip(by_task, turn, strict=True):
            if used is not None:
                room = max(top_k, round(SHARE * used.shape[1]))
                rank = np.argsort(np.argsort(-used, axis=1, kind="stable"), axis=1)
                stream.append((task, used, np.asarray(rank < room)))
    return stream


def _replay(stream: Sequence[_Turn], period: int, phase: int) -> tuple[float, float]:
    """Weight outside of the sets, and all weight, of prompts whose task has a set by then."""
    lost = whole = 0.0
    last: dict[str | None, BoolArray] = {}
    serving: dict[str | None, BoolArray] = {}
    for number, (task, used, own) in enumerate(stream):
        if number % period == phase:
            serving = dict(last)
        if task in serving:
            whole += float(used.sum())
            lost += float(used[~serving[task]].sum())
        last[task] = own
    return lost, whole
