"""How sure a mean is: bootstrap intervals over groups that were drawn independently."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LOW, HIGH = 5.0, 95.0  # percentiles: nine of ten such intervals hold the mean
SEED = 0


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean with its 90 % interval over `count` groups."""

    value: float
    low: float
    high: float
    count: int


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Mean:
    """The mean of one value a group, and what it would be for other draws of the groups.

    The draws are seeded: the same values give the same interval. With one group it is a point.
    """
    assert values
    given = np.asarray(values, dtype=np.float64)
    heavy = np.ones_like(given) if weights is None else np.asarray(weights, dtype=np.float64)
    picks = np.random.default_rng(SEED).integers(len(given), size=(DRAWS, len(given)))
    drawn = (given[picks] * heavy[picks]).sum(axis=1) / heavy[picks].sum(axis=1)
    low, high = np.percentile(drawn, [LOW, HIGH])
    return Mean(float(np.average(given, weights=heavy)), float(low), float(high), len(given))
