"""Learns a profile from the requests that a server has answered, and keeps it on disk.

Counts are plain sums. Once a task has `FADE` requests all of its counts are halved, so that they
stay bounded and what was common long ago fades. A request never fails because of it: a disk that
does not take the file is said once, and tried again later. One thread may call it at a time.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retinue.engine.request import Request
from retinue.errors import Unsupported, UsageError, WriteError
from retinue.model.profiles import find_profile, learnt_profile, read_profile, write_profile
from retinue.policy.measured import Counts, rounded_length
from retinue.policy.profile import Profile, TaskCounts
from retinue.types import Facts, FloatArray

log = logging.getLogger("retinue")

SAVE_REQUESTS, SAVE_S = 64, 60.0
FADE = 2000  # requests of one task, after which its counts are halved
KEPT_WORDS = 4096  # token ids of a task in memory; the file keeps fewer


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that was answered: what its routers chose, and how long it was.

    `used` [layers, experts] is the routing weight of the prompt's tokens, by the routers' own
    choice; None where it was not recorded. `prompt` are the ids that the request began with.
    """

    task: str | None
    used: FloatArray | None
    prompt: Sequence[int]
    answer_tokens: int


def finished(request: Request) -> Finished:
    """A request that has ended. Its routing is there if the host's accounts were on meanwhile."""
    used = None if request.usage is None else request.usage.used
    return Finished(request.task, used, request.prompt, len(request.token_ids))


def open_learner(folder: Path, facts: Facts, file: str | None = None) -> "Learner":
    """A learner for the checkpoint in `folder`, on top of its profile, or of `file`, or of none.

    What it learns is remembered beside the profile. Raises UsageError for a profile that is damaged
    or another model's.
    """
    try:
        measured = find_profile(folder, facts, file)
    except Unsupported:
        measured = Profile(facts.name, facts.layers, facts.experts_per_layer, facts.top_k, {})
    return Learner(measured, learnt_profile(folder))


class Learner:
    """Adds finished requests to what `file` holds of earlier ones, and writes it again.

    `measured` is the profile that was made beforehand; it stays as it is, and `profile` is both
    together. The file is written whole or not at all, every `SAVE_REQUESTS` requests, or after
    `SAVE_S` seconds when the next one ends, and by `close`. A file that is damaged, or another
    model's, is said and replaced. Requests without a task teach nothing.
    """

    def __init__(
        self, measured: Profile, file: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._measured, self._file, self._clock = measured, file, clock
        self._learnt = replace(measured, tasks={}, periods=None, costs=None)
        self._both: Profile | None = None
        self._saved_s, self._unsaved = clock(), 0
        self._warned = False
        if file.is_file():
            try:
                self._learnt = self._learnt.plus(read_profile(file))
            except UsageError as error:
                log.warning("what earlier requests taught is not used: %s", error)

    @property
    def profile(self) -> Profile:
        """What was measured and what was learnt, together."""
        if self._both is None:
            self._both = self._measured.plus(self._learnt)
        return self._both

    def learn(self, request: Finished) -> None:
        """Add one request, and save if it is time to, which may take a tenth of a second."""
        if request.task is None:
            return
        task, known = _counts(self._learnt, request), self._learnt.tasks.get(request.task)
        whole = _bounded(task if known is None else known.plus(task))
        self._learnt = replace(self._learnt, tasks={**self._learnt.tasks, request.task: whole})
        self._both = None
        self._unsaved += 1
        if self._unsaved >= SAVE_REQUESTS or self._clock() - self._saved_s >= SAVE_S:
            self.save()

    def save(self) -> None:
        """Write what was learnt, if anything; a warning, once, where that is not possible."""
        if not self._unsaved:
            return
        self._saved_s, self._unsaved = self._clock(), 0
        try:
            write_profile(self._learnt, self._file)
        except WriteError as error:
            self._unsaved = 1  # still to be written, but not tried again with every request
            if not self._warned:
                log.warning("what requests teach is not kept: %s", error)
            self._warned = True

    def close(self) -> None:
        """Write what is not written yet."""
        self.save()


def _counts(profile: Profile, request: Finished) -> TaskCounts:
    """One request as counts. Choices stay those of measured texts: weight is what is asked for."""
    shape = (profile.layers, profile.experts)
    used = np.zeros(shape, np.float32) if request.used is None else request.used
    assert used.shape == shape, (used.shape, shape)
    return TaskCounts(
        1,
        len(request.prompt),
        np.zeros(shape, np.int64),
        used.astype(np.float32),
        words=Counter(request.prompt),
        words_total=len(request.prompt),
        answers={rounded_length(request.answer_tokens): 1},
    )


def _bounded(task: TaskCounts) -> TaskCounts:
    words = task.words
    if len(words) > 2 * KEPT_WORDS:
        words = dict(Counter(words).most_common(KEPT_WORDS))
    if task.texts < FADE:
        return task if words is task.words else replace(task, words=words)
    return replace(
        task,
        texts=task.texts // 2,
        tokens=task.tokens // 2,
        choices=task.choices // 2,
        weight=task.weight * np.float32(0.5),
        words=_halved(words),
        words_total=task.words_total // 2,
        answers=_halved(task.answers),
        continuations=_halved(task.continuations),
    )


def _halved(counts: Counts) -> dict[int, int]:
    return {key: count // 2 for key, count in counts.items() if count > 1}
