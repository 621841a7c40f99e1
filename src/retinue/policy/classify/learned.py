"""A classifier learnt from the profile: which task's texts use such tokens.

Multinomial naive Bayes over token ids, every task equally likely beforehand, because the mix of
the profile's texts says nothing of the mix that will be served. Naive Bayes always prefers
somebody, and is always sure; whether the prompt is of the kind at all is asked separately.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from retinue.types import IntArray

SMOOTHING = 0.5  # what every id counts beforehand; 0.1 and 1 do as well
LIKENESS = 0.65  # of a prompt to its task, below which it is unknown; see `_likeness`

Floats = npt.NDArray[np.float64]


class Learned:
    """Names the task whose tokens a prompt's are; None for a prompt unlike every task.

    words: by task, how often each of its most frequent token ids occurred.
    """

    def __init__(self, words: Mapping[str, Mapping[int, int]]) -> None:
        self._tasks = tuple(words)
        # Ids that no task has share the last column.
        self._ids: IntArray = np.unique([token for counts in words.values() for token in counts])
        counted = np.zeros((len(self._tasks), len(self._ids) + 1))
        for row, counts in enumerate(words.values()):
            tokens = np.fromiter(counts, dtype=np.int64)
            counted[row, np.searchsorted(self._ids, tokens)] = list(counts.values())
        smooth = counted + SMOOTHING
        self._shares: Floats = smooth / smooth.sum(axis=1, keepdims=True)  # [tasks, ids + 1]
        self._logs: Floats = np.log(self._shares)

    def classify(self, text: str, ids: Sequence[int]) -> str | None:
        """The likeliest task; None for no tokens, and for tokens unlike that task's."""
        if not ids:
            return None
        counts = self._counted(ids)
        best = int(np.argmax(self._logs @ counts))
        return self._tasks[best] if _likeness(counts, self._shares[best]) >= LIKENESS else None

    def _counted(self, ids: Sequence[int]) -> Floats:
        tokens = np.asarray(ids, dtype=np.int64)
        columns = np.searchsorted(self._ids, tokens)
        unknown = len(self._ids)
        known = self._ids[np.minimum(columns, unknown - 1)] == tokens
        columns = np.where(known, columns, unknown)
        return np.bincount(columns, minlength=unknown + 1).astype(np.float64)


def _likeness(counts: Floats, shares: Floats) -> float:
    """How near `counts` [ids] come to a text of the same length that was drawn from `shares`.

    The Bhattacharyya coefficient of both, over what such a text is expected to reach: about 1 for
    the task's own texts, however short, and near 0 for others. The expected root of a Poisson
    count of mean x is x / sqrt(1 + x), within a tenth.
    """
    total = counts.sum()
    reached = np.sqrt(shares * counts).sum()
    expected = (np.sqrt(shares) * (mean := shares * total) / np.sqrt(1 + mean)).sum()
    return float(reached / expected)
