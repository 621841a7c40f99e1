"""Whether prompts are served clearly worse than was promised, so that a period should end early.

eMoE (arXiv 2503.06823, section 4.1) forecasts once in 40 prompts, so that a burst of a task that
was not forecast waits for up to 39. Here each prompt that was read says which share of its
routing weight the resident experts could serve; the tables said which share they would serve.
"""

import numpy as np
import numpy.typing as npt

from retinue.policy.base import BoolArray
from retinue.types import FloatArray

DECAY = 0.7  # of what prompts before said, with each further one
LIMIT = 0.1  # of routing weight
EARLIEST = 10  # at most so many refreshes a period: what cannot be forecast is not asked for ever


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
