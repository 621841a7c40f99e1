"""What comes: a decayed mean of what the recent prompts of the task used.

The profile counts as some prompts that came before the first, so that a task is served by its
popularity until its own prompts say otherwise. A task that the profile does not know begins with
the popularity of all and leaves it soon. The other baseline that eMoE (arXiv 2503.06823) leaves
out, and the one that served best; see docs/LOG.md.
"""

import numpy as np

from retinue.policy.base import Popularity
from retinue.policy.predict.shares import Shares, blend, shares_of
from retinue.types import FloatArray

DECAY = 0.98  # of a prompt's weight, with each later prompt of its task
# As many prompts does the profile count as: for a task that it knows, and for one of which it
# says what it says of all together.
KNOWN_PROMPTS, UNKNOWN_PROMPTS = 8.0, 1.0


class RunningMean:
    """One mean a task; requests without a task have one of their own."""

    def __init__(self, prior: Popularity, decay: float = DECAY) -> None:
        assert 0 < decay <= 1, f"{decay = }, must be over 0, and 1 at most"
        self._prior, self._decay = prior, decay
        self._sums: dict[str | None, tuple[float, Shares]] = {}  # weight and sum of its prompts

    def shares(self, task: str | None) -> Shares:
        """The mean of the task's prompts and of what the profile says of it."""
        prior = self._prior.shares(task)
        if task not in self._sums:
            return prior
        weight, total = self._sums[task]
        unknown = np.array_equal(prior, self._prior.shares(None))
        prompts = UNKNOWN_PROMPTS if unknown else KNOWN_PROMPTS
        return blend(shares_of(total), prior, prompts / (prompts + weight))

    def observe(self, task: str | None, used: FloatArray) -> None:
        """Add the prompt to the mean of its task; the others stay as they are."""
        weight, total = self._sums.get(task, (0.0, np.zeros(used.shape)))
        self._sums[task] = weight * self._decay + 1, total * self._decay + shares_of(used)
