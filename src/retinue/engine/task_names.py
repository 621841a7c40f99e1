"""Which names of tasks are told apart: clients name tasks as they like, and memory has an end.

Tables, means, counters and what a server learns are kept for each task as long as the process
lives. So names beyond a number stand for no task at all.
"""

import logging
from collections.abc import Iterable

from retinue.config import Config
from retinue.policy.profile import Profile

log = logging.getLogger("retinue")

MOST_TASKS = 64  # of which what is learnt, the largest part, takes up to a megabyte each


class TaskNames:
    """The `known` names, and the first others as long as there are fewer than `most` in all.

    A server, whose clients may be anybody, takes the known ones alone.
    """

    def __init__(self, known: Iterable[str], most: int = MOST_TASKS) -> None:
        self.known = frozenset(known)
        self._names, self._most = set(self.known), most
        self._said = False

    def told(self, task: str | None) -> str | None:
        """`task`, or None if it is one name too many; the first time that is a warning."""
        if task is None or task in self._names:
            return task
        if len(self._names) < self._most:
            self._names.add(task)
            return task
        if not self._said:
            log.warning("more than %d tasks: `%s` and others count as unknown", self._most, task)
            self._said = True
        return None


def task_names(config: Config, profile: Profile | None) -> TaskNames:
    """With those that the settings and the profile name."""
    rules = [*config.keys.values(), *config.routes.values()]
    named = {rule["task"] for rule in rules if "task" in rule} | {*config.deadlines}
    named |= {config.task} if config.task is not None else set()
    return TaskNames(named | {*(profile.tasks if profile is not None else ())})
