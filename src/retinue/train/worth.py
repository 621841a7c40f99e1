"""What a forecast of single tokens' experts is worth: named against needed, row by row."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from retinue.types import FloatArray

Flags = npt.NDArray[np.bool_]


def top(scores: FloatArray, count: int) -> Flags:
    """Which are the `count` largest of the last axis; of equal ones the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    found = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found


def judged(named: Flags, needed: Flags) -> Mapping[str, tuple[float, ...]]:
    """Precision, recall and F1 by row of [tokens, rows, experts]."""
    right = (named & needed).sum(axis=(0, 2))
    precision = right / np.maximum(named.sum(axis=(0, 2)), 1)
    recall = right / np.maximum(needed.sum(axis=(0, 2)), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    figures = {"precision": precision, "recall": recall, "f1": f1}
    return {name: tuple(values.tolist()) for name, values in figures.items()}
