"""Keeps the experts of a fixed placement in memory, and changes them with the tasks that run.

It is asked before every step and acts when the tasks are others than before. Nothing else loads
or evicts while its preset restricts the routers.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retinue.config import Config
from retinue.engine.learning import Learner
from retinue.errors import UsageError
from retinue.model.experts import ExpertHost
from retinue.model.profiles import find_profile, learnt_profile
from retinue.policy.base import BoolArray, Placement, Popularity
from retinue.policy.place.even import even_rooms
from retinue.policy.profile import Profile
from retinue.types import Facts

log = logging.getLogger("retinue")


def known_beforehand(
    folder: Path, facts: Facts, placement: Placement, config: Config
) -> Profile | None:
    """The profile that `placement` needs, before anything is loaded.

    Where requests teach, with what earlier ones taught.

    Raises Unsupported where there is no profile, UsageError for one that is damaged, another
    model's, or read by nobody.
    """
    if placement.needs_profile:
        known = find_profile(folder, facts, config.profile)
        return Learner(known, learnt_profile(folder)).profile if config.learn else known
    if config.profile is not None:
        raise UsageError(
            f"the preset `{config.preset}` reads no profile: `{config.profile}`",
            hint="leave `--profile` out, or use a preset that does, such as `popular`",
        )
    return None


class Residents:
    """The placement of one model; `there` [layers, experts] says which experts it has."""

    def __init__(
        self,
        host: ExpertHost,
        placement: Placement,
        known: Profile | None,
        there: BoolArray,
    ) -> None:
        self._host, self._placement = host, placement
        self._known: Popularity = known if known is not None else _Nothing()
        self._names = frozenset(known.tasks) if known is not None else frozenset()
        self._there = there
        self._rooms = even_rooms(host.cache.slots, self._there)
        self._tasks: tuple[str | None, ...] | None = None
        self._said: set[str | None] = set()
        self.bytes_read = 0  # by all changes

    def start(self, task: str | None) -> None:
        """Load the first set, and let it serve from now on."""
        self._change((task,))
        assert self._host.restriction is not None
        self._host.restriction.active = True
        self._host.begin = self.begin

    def begin(self, tasks: Sequence[str | None]) -> int:
        """Requests of `tasks`, one each, run next: load their set where it is another.

        Returns the bytes read. Raises the error of a read that failed.
        """
        wanted = tuple(sorted(tasks, key=str)) if self._placement.by_task else ()
        for task in set(wanted) - self._said - self._names:
            self._said.add(task)
            what = "no task was given" if task is None else f"the profile has no task `{task}`"
            log.warning("%s: the popularity of all tasks together decides", what)
        if self._tasks == wanted:
            return 0
        before = self.bytes_read
        self._change(wanted)
        return self.bytes_read - before

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within, the plain model runs and use decides what stays; afterwards `begin` loads."""
        assert self._host.restriction is not None
        self._host.restriction.active = False
        self._tasks = None
        try:
            yield
        finally:
            self._host.restriction.active = True

    def _change(self, tasks: tuple[str | None, ...]) -> None:
        self._tasks = None  # should a read fail, the next step tries again
        wanted = self._placement.place(self._rooms, self._there, tasks, self._known)
        known = [self._known.shares(task) for task in tasks or (None,)]
        self.bytes_read += self._host.place(wanted, np.mean(known, axis=0))
        self._tasks = tasks if self._placement.by_task else ()


class _Nothing:
    """No profile: every expert is as popular as any other."""

    def shares(self, task: str | None) -> npt.NDArray[np.float64]:
        return np.zeros((1, 1))
