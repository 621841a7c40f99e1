"""What comes: what the last prompt used, whatever its task.

The assumption behind eMoE (arXiv 2503.06823, section 3.3), which finds that consecutive prompts
use like experts, taken at its word. Deviation: a hundredth of the profile ranks the experts that
the last prompt did not use.
"""

from retinue.policy.base import Popularity
from retinue.policy.predict.shares import Shares, blend, shares_of
from retinue.types import FloatArray

PRIOR = 0.01


class PreviousPrompt:
    """The shares of the last prompt; the profile's before the first."""

    def __init__(self, prior: Popularity) -> None:
        self._prior = prior
        self._last: Shares | None = None

    def shares(self, task: str | None) -> Shares:
        """The last prompt's, and a little of what the profile says of `task`."""
        prior = self._prior.shares(task)
        return prior if self._last is None else blend(self._last, prior, PRIOR)

    def observe(self, task: str | None, used: FloatArray) -> None:
        """Keep the shares of `used`."""
        self._last = shares_of(used)
