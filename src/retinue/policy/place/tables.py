"""What placements know of tasks: a forecaster's tables, kept from one refresh to the next.

How sensitive a task is and how long its answers are comes from the profile alone.
"""

import numpy as np
import numpy.typing as npt

from retinue.policy.base import BoolArray, Forecaster
from retinue.policy.place.damage import damage
from retinue.policy.predict.own_prefill import OwnPrefill
from retinue.policy.profile import Profile
from retinue.types import FloatArray

Shares = npt.NDArray[np.float64]  # [layers, experts]


class Tables:
    """The forecaster is asked once for each task, and again after `renew`.

    Without a forecaster the profile's popularity decides, without a profile every expert is as
    popular as any other.
    """

    def __init__(
        self, shape: tuple[int, int], profile: Profile | None, forecaster: Forecaster | None = None
    ) -> None:
        self._shape, self._profile, self._forecaster = shape, profile, forecaster
        self._kept: dict[str | None, Shares] = {}
        self._asked: set[str | None] = set()
        # By task, what the profile says of it, which does not change.
        self._sensitive: dict[str | None, BoolArray] = {}
        self._answers: dict[str | None, float] = {}
        self._damage: Shares | None = None

    @property
    def names(self) -> frozenset[str]:
        """The tasks that the profile knows."""
        return frozenset(self._profile.tasks) if self._profile is not None else frozenset()

    def shares(self, task: str | None) -> Shares:
        """The share of routing weight of each expert; see `policy.base.Popularity`."""
        if task not in self._kept:
            source = self._forecaster or self._profile
            shares = np.ones(self._shape) if source is None else source.shares(task)
            self._asked.add(task)
            self._kept[task] = np.asarray(shares, dtype=np.float64)
        return self._kept[task]

    def sensitive(self, task: str | None) -> BoolArray:
        """In which layers it matters to the task which expert serves: `[layers]`."""
        if task not in self._sensitive:
            known, every = self._profile, np.ones(self._shape[0], dtype=bool)
            self._sensitive[task] = every if known is None else known.sensitive(task)
        return self._sensitive[task]

    def answer_tokens(self, task: str | None) -> float:
        """How long the task's answers are on average; 0 if that is not known."""
        if task not in self._answers:
            lengths = None if self._profile is None else self._profile.output_tokens(task)
            self._answers[task] = 0.0 if lengths is None else lengths.mean
        return self._answers[task]

    def knows(self, task: str | None) -> bool:
        """Whether it was ever asked for the table of `task`."""
        return task in self._asked

    def damage(self) -> Shares:
        """How much it hurts when another expert serves; see `policy.base.Known`."""
        if self._damage is None:
            known = self._profile
            self._damage = np.ones(self._shape) if known is None else damage(known)
        return self._damage

    @property
    def own(self) -> bool:
        """Whether each prompt's answer has a table of its own, from `observe` to `renew`."""
        return isinstance(self._forecaster, OwnPrefill)

    def observe(self, task: str | None, used: FloatArray) -> None:
        """Tell the forecaster what a prompt of `task` used: `[layers, experts]`, summed weights.

        Of several prompts of a task that answer at once, the last one's own table counts.
        """
        if isinstance(self._forecaster, OwnPrefill):
            self._kept[task] = self._forecaster.own(task, used)
        if self._forecaster is not None:
            self._forecaster.observe(task, used)

    def renew(self) -> None:
        """Ask the forecaster anew from now on."""
        self._kept.clear()
