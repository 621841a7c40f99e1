"""What comes: a decayed mean of what the recent prompts of the task used.

The profile counts as the prompts that came before the first, so that a task is served by its
popularity until its own prompts say otherwise; a task that the profile does not know begins with
the popularity of all. The other baseline that eMoE (arXiv 2503.06823) leaves out.
"""

from retinue.policy.base import Popularity
from retinue.policy.predict.shares import Shares, blend, shares_of
from retinue.types import FloatArray

DECAY = 0.95  # of a prompt's weight, with each later prompt of its task
PRIOR_PROMPTS = 8.0  # as many prompts does the profile count as


class RunningMean:
    """One mean a task; requests without a task have one of their own."""

    def __init__(
        self, prior: Popularity, decay: float = DECAY, prior_prompts: float = PRIOR_PROMPTS
    ) -> None:
        assert 0 < decay <= 1, f"{decay = }, must be in (0, 1]"
        assert prior_prompts > 0, f"{prior_prompts = }, must be over 0"
        self._prior, self._decay, self._prior_prompts = prior, decay, prior_prompts
        self._sums: dict[str | None, tuple[float, Shares]] = {}  # weight and sum of its prompts

    def shares(self, task: str | None) -> Shares:
        """The mean of the task's prompts and of what the profile says of it."""
        prior = self._prior.shares(task)
        if task not in self._sums:
            return prior
        weight, total = self._sums[task]
        return blend(shares_of(total), prior, self._prior_prompts / (self._prior_prompts + weight))

    def observe(self, task: str | None, used: FloatArray) -> None:
        """Add the prompt to the mean of its task; the others stay as they are."""
        weight, total = self._sums.get(task, (0.0, 0.0))
        self._sums[task] = weight * self._decay + 1, total * self._decay + shares_of(used)
