"""What was learnt of a model's routing, by task: how often each expert is chosen.

Counts only, so that profiles of the same model add up. It knows no files; `model/profiles.py`
reads and writes them. Tasks are objects of named parts: a reader ignores the parts that it does
not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retinue.errors import UsageError
from retinue.types import FloatArray, IntArray

FORMAT, VERSION = "retinue-profile", 1


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """One task's routing: how many texts and tokens, and per expert its choices and weight."""

    texts: int
    tokens: int
    choices: IntArray  # [layers, experts]
    weight: FloatArray  # [layers, experts], summed routing weight

    def plus(self, other: "TaskCounts") -> "TaskCounts":
        """Both together."""
        return TaskCounts(
            self.texts + other.texts,
            self.tokens + other.tokens,
            self.choices + other.choices,
            self.weight + other.weight,
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """Counts by task for one model; `layers` are decoder layers, those without experts are 0."""

    model: str
    layers: int
    experts: int
    top_k: int
    tasks: Mapping[str, TaskCounts]

    def shares(self, task: str | None) -> npt.NDArray[np.float64]:
        """Per layer the share of routing weight of each expert; see `policy.base.Popularity`.

        Weight tells more than the number of choices: of a set of the same size it kept more
        agreement in every measurement.
        """
        known = self.tasks.get(task) if task is not None else None
        chosen = list(self.tasks.values()) if known is None else [known]
        weight = np.zeros((self.layers, self.experts))
        for counts in chosen:
            weight += counts.weight
        whole = weight.sum(axis=1, keepdims=True)
        return np.asarray(weight / np.where(whole > 0, whole, 1))

    def plus(self, other: "Profile") -> "Profile":
        """The counts of both. Raises UsageError for profiles of different models."""
        if self._shape != other._shape:
            raise UsageError(
                f"the profiles are of different models: {_words(self)} and {_words(other)}",
                hint="merge profiles of one model only",
            )
        tasks = dict(self.tasks)
        for name, counts in other.tasks.items():
            tasks[name] = tasks[name].plus(counts) if name in tasks else counts
        return Profile(self.model, *self._shape, tasks)

    def as_dict(self) -> dict[str, Any]:
        """JSON-shaped, with its format and version."""
        head = {"format": FORMAT, "version": VERSION, "model": self.model}
        head |= {"layers": self.layers, "experts": self.experts, "top_k": self.top_k}
        return head | {"tasks": {name: _task_dict(task) for name, task in self.tasks.items()}}

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.layers, self.experts, self.top_k


def profile_from(content: Any) -> Profile:
    """The profile in a JSON document. Raises UsageError that says what is wrong with it."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError("not a profile", hint="make one with `retinue profile MODEL`")
    if content.get("version") != VERSION:
        raise UsageError(
            f"unknown version of a profile: `{content.get('version')}`",
            hint=f"this version of retinue reads {VERSION}; make the profile again",
        )
    try:
        layers, experts, top_k = (int(content[key]) for key in ("layers", "experts", "top_k"))
        tasks = {
            str(name): _task_from(task, (layers, experts))
            for name, task in dict(content["tasks"]).items()
        }
        return Profile(str(content["model"]), layers, experts, top_k, tasks)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"damaged profile: {error!r}", hint="make it again") from error


def _task_dict(task: TaskCounts) -> dict[str, Any]:
    popularity = {
        "choices": task.choices.tolist(),
        "weight": [[round(value, 2) for value in row] for row in task.weight.tolist()],
    }
    return {"texts": task.texts, "tokens": task.tokens, "popularity": popularity}


def _task_from(task: Any, shape: tuple[int, int]) -> TaskCounts:
    popularity = task["popularity"]
    choices = np.array(popularity["choices"], dtype=np.int64)
    weight = np.array(popularity["weight"], dtype=np.float32)
    if choices.shape != shape or weight.shape != shape or (choices < 0).any():
        raise ValueError(f"popularity is not {shape[0]} layers of {shape[1]} counts")
    return TaskCounts(int(task["texts"]), int(task["tokens"]), choices, weight)


def _words(profile: Profile) -> str:
    return f"{profile.layers} layers of {profile.experts} experts, top {profile.top_k}"
