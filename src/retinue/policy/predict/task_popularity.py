"""What comes: what the profile counted for the task. The baseline that eMoE leaves out."""

from retinue.policy.base import Popularity
from retinue.policy.predict.shares import Shares
from retinue.types import FloatArray


class TaskPopularity:
    """The profile's shares of a task, whatever the prompts before used."""

    def __init__(self, prior: Popularity) -> None:
        self._prior = prior

    def shares(self, task: str | None) -> Shares:
        """The profile's own: `[layers, experts]`."""
        return self._prior.shares(task)

    def observe(self, task: str | None, used: FloatArray) -> None:
        """Nothing to learn."""
