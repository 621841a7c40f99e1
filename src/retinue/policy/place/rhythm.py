"""When to forecast before a period ends: after a change, then ever more rarely.

eMoE (arXiv 2503.06823, section 4.1) forecasts once in 40 prompts, so that a burst of a task that
was not forecast waits for up to 39. Here a change lets the next forecasts come after 1, 2, 4, ...
prompts, until it is the period again: a task of which there was no table, or prompts that are
served clearly worse than was promised. Each prompt that was read says which share of its routing
weight the resident experts could serve; the tables said which share they would serve.
"""

import numpy as np
import numpy.typing as npt

from retinue.policy.base import BoolArray
from retinue.types import FloatArray

DECAY = 0.7  # of what prompts before said, with each further one
LIMIT = 0.1  # of routing weight


class Rhythm:
    """Counts prompts from one forecast to the next. `impatient`: changes shorten the period."""

    def __init__(self, period: int, *, impatient: bool) -> None:
        self.period, self._impatient = period, impatient
        self._interval = 1 if impatient else period
        self._since = 0

    @property
    def due(self) -> bool:
        """Whether to forecast before the next prompt."""
        return self._since >= self._interval

    def count(self, prompts: int) -> None:
        """So many prompts began."""
        self._since += prompts

    def change(self) -> None:
        """What is forecast may be wrong now."""
        if self._impatient:
            self._interval = 1

    def forecast(self) -> None:
        """It was done."""
        self._since = 0
        self._interval = min(2 * self._interval, self.period)


class Drift:
    """A decayed mean of the share that was promised and not served."""

    def __init__(self, decay: float = DECAY, limit: float = LIMIT) -> None:
        self._decay, self._limit = decay, limit
        self._missed = 0.0

    def observe(
        self, promised: npt.NDArray[np.float64], used: FloatArray, resident: BoolArray
    ) -> None:
        """A prompt was read. [layers, experts] each: `promised` shares, `used` weights."""
        short = _served(promised, resident) - _served(used, resident)
        self._missed = self._decay * self._missed + (1 - self._decay) * short

    @property
    def due(self) -> bool:
        """Whether so much less is served that a forecast may pay."""
        return self._missed > self._limit

    def reset(self) -> None:
        """A new forecast: what was missed before says nothing of it."""
        self._missed = 0.0


def _served(weight: npt.NDArray[np.floating], resident: BoolArray) -> float:
    """The share of `weight` on `resident`, over all layers."""
    whole = float(weight.sum())
    return float(weight[resident].sum()) / whole if whole else 0.0
