"""What comes: what the prompt itself used while it was read.

It cannot forecast the reading, only the answer: a prompt is read with the running mean of its
task, then `own` turns what its routers chose into the shares that its answer is placed by. That
is a refresh a prompt, where the other forecasters need one a period: it says what is lost by
looking further ahead, as eMoE-E does (arXiv 2503.06823, section 5), which predicts each prompt.
"""

from retinue.policy.base import Popularity
from retinue.policy.predict.running_mean import RunningMean
from retinue.policy.predict.shares import Shares, blend, shares_of
from retinue.types import FloatArray

PRIOR = 0.3  # of the mean's share, for what the answer uses and the prompt did not


class OwnPrefill:
    """Before a prompt is read the mean of its task's prompts, afterwards mostly its own."""

    def __init__(self, prior: Popularity) -> None:
        self._mean = RunningMean(prior)

    def shares(self, task: str | None) -> Shares:
        """What a prompt of `task` is read with."""
        return self._mean.shares(task)

    def own(self, task: str | None, used: FloatArray) -> Shares:
        """What the answer will use, of a prompt of `task` that used `used`: [layers, experts]."""
        return blend(shares_of(used), self._mean.shares(task), PRIOR)

    def observe(self, task: str | None, used: FloatArray) -> None:
        """Add the prompt to its task's mean."""
        self._mean.observe(task, used)
