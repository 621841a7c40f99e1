"""eMoE-A: the next prompt's experts in all layers at once, from the previous prompt's.

eMoE, arXiv 2503.06823, section 3.3. Deviations, beside those of the network: the task of the next
prompt is an input, because in a mixed stream the previous prompt is often another task's; and the
network corrects the running mean of the task's prompts, which the paper does not compare with.
"""

from retinue.policy.base import Popularity
from retinue.policy.predict.learned import Learned
from retinue.policy.predict.running_mean import RunningMean
from retinue.policy.predict.shares import Shares, shares_of
from retinue.types import FloatArray


class EmoeAll:
    """One call of the network a forecast; before the first prompt the profile decides."""

    def __init__(self, prior: Popularity, learned: Learned) -> None:
        self._mean, self._learned = RunningMean(prior), learned
        self._last: Shares | None = None  # of the last prompt, whatever its task

    def shares(self, task: str | None) -> Shares:
        """What the network makes of the last prompt, for a prompt of `task`."""
        prior = self._mean.shares(task)
        if self._last is None:
            return prior
        rows, network = self._learned.rows, self._learned.networks["emoe-a"]
        said = network.shares(self._last[rows], prior[rows], self._learned.task(task))
        return self._learned.spread(said)

    def observe(self, task: str | None, used: FloatArray) -> None:
        """Keep the shares of `used`."""
        self._last = shares_of(used)
        self._mean.observe(task, used)
