"""eMoE-L: the next prompt's experts layer by layer, each from those before it.

eMoE, arXiv 2503.06823, section 3.3: the first layer is copied from the previous prompt, then the
network is called once for each further layer. Deviations, beside those of the network: the previous
prompt is the last one of the same task, if there is one, because in a mixed stream the copy would
mislead all further layers; each layer sees all layers before it; the task is an input, and the
network corrects the running mean of the task's prompts.
"""

import numpy as np

from retinue.policy.base import Popularity
from retinue.policy.predict.learned import Learned
from retinue.policy.predict.running_mean import RunningMean
from retinue.policy.predict.shares import Shares, shares_of
from retinue.types import FloatArray


class EmoeLayerwise:
    """As many calls of the network as there are layers; before a task's first prompt its mean."""

    def __init__(self, prior: Popularity, learned: Learned) -> None:
        self._mean, self._learned = RunningMean(prior), learned
        self._last: dict[str | None, Shares] = {}

    def shares(self, task: str | None) -> Shares:
        """What the network makes of the first layer of the task's last prompt."""
        prior = self._mean.shares(task)
        if task not in self._last:
            return prior
        rows, network = self._learned.rows, self._learned.networks["emoe-l"]
        said = np.zeros_like(prior[rows])
        said[0] = self._last[task][rows[0]]
        for layer in range(1, len(rows)):
            said[layer] = network.shares(said, prior[rows], self._learned.task(task))[layer]
        return self._learned.spread(said)

    def observe(self, task: str | None, used: FloatArray) -> None:
        """Keep the shares of `used`."""
        self._last[task] = shares_of(used)
        self._mean.observe(task, used)
