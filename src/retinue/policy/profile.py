"""What was learnt of a model's routing, by task: how often each expert is chosen, and more.

Counts and weighted means only, so that profiles of the same model add up. It knows no files;
`model/profiles.py` reads and writes them. Tasks are objects of named parts: a reader ignores the
parts that it does not know, and every part but `popularity` may be missing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from retinue.errors import UsageError
from retinue.policy.base import BoolArray
from retinue.policy.measured import (
    Counts,
    MachineCosts,
    OutputTokens,
    Periods,
    Sensitivity,
    add_counts,
    costs_from,
    counts_from,
    output_tokens,
    periods_dict,
    periods_from,
    sensitivity_dict,
    sensitivity_from,
)
from retinue.policy.recommended import (
    Recommendations,
    joined,
    recommendations_from,
    recommendations_list,
)
from retinue.policy.transitions import Transitions, transitions_dict, transitions_from
from retinue.types import FloatArray, IntArray

Part = TypeVar("Part", Sensitivity, Periods, Transitions)
FORMAT, VERSION = "retinue-profile", 1
WORDS = 1000  # token ids of prompts that a task keeps, the most frequent ones


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """One task: how many texts and tokens, per expert its choices and weight, and what is known.

    `words` counts the most frequent token ids of the prompts, out of `words_total`. `answers`
    counts answers that the model ended, or that were served, by their tokens, `continuations`
    those that the texts gave.
    """

    texts: int
    tokens: int
    choices: IntArray  # [layers, experts]
    weight: FloatArray  # [layers, experts], summed routing weight
    words: Counts = field(default_factory=dict)
    words_total: int = 0
    answers: Counts = field(default_factory=dict)
    continuations: Counts = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    transitions: Transitions | None = None

    def plus(self, other: "TaskCounts") -> "TaskCounts":
        """Both together."""
        return TaskCounts(
            self.texts + other.texts,
            self.tokens + other.tokens,
            self.choices + other.choices,
            self.weight + other.weight,
            add_counts(self.words, other.words),
            self.words_total + other.words_total,
            add_counts(self.answers, other.answers),
            add_counts(self.continuations, other.continuations),
            _either(self.sensitivity, other.sensitivity),
            _either(self.transitions, other.transitions),
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """Counts by task for one model; `layers` are decoder layers, those without experts are 0."""

    model: str
    layers: int
    experts: int
    top_k: int
    tasks: Mapping[str, TaskCounts]
    periods: Periods | None = None
    costs: MachineCosts | None = None
    recommended: Recommendations = ()

    @property
    def period(self) -> int | None:
        """Every how many prompts the resident set is worth choosing anew; None if unknown."""
        return None if self.periods is None else self.periods.best

    def sensitive(self, task: str | None) -> BoolArray:
        """In which layers wrong routing hurts the task: `[layers]`; all where that is unknown.

        A task that is None or unknown is as sensitive as any of them.
        """
        known = self.tasks.get(task) if task is not None else None
        chosen = list(self.tasks.values()) if known is None else [known]
        hurts = np.zeros(self.layers, dtype=bool)
        for counts in chosen:
            own = np.ones(self.layers, dtype=bool)
            if counts.sensitivity is not None:
                own[list(counts.sensitivity.insensitive(self.layers))] = False
            hurts |= own
        return hurts if chosen else ~hurts

    def output_tokens(self, task: str | None) -> OutputTokens | None:
        """How long answers are: those of the model if known, else the texts' own; None: unknown.

        Of all tasks together where `task` is None or unknown.
        """
        known = self.tasks.get(task) if task is not None else None
        chosen = list(self.tasks.values()) if known is None else [known]
        lengths: Counts = {}
        for counts in chosen:
            lengths = add_counts(lengths, counts.answers or counts.continuations)
        return output_tokens(lengths)

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
        """The counts of both; costs and recommendations are `other`'s, if it has any.

        Raises UsageError for profiles of different models.
        """
        if self._shape != other._shape:
            raise UsageError(
                f"the profiles are of different models: {_words(self)} and {_words(other)}",
                hint="merge profiles of one model only",
            )
        tasks = dict(self.tasks)
        for name, counts in other.tasks.items():
            tasks[name] = tasks[name].plus(counts) if name in tasks else counts
        periods = _either(self.periods, other.periods)
        costs, best = other.costs or self.costs, joined(self.recommended, other.recommended)
        return Profile(self.model, *self._shape, tasks, periods, costs, best)

    def as_dict(self) -> dict[str, Any]:
        """JSON-shaped, with its format and version."""
        head: dict[str, Any] = {"format": FORMAT, "version": VERSION, "model": self.model}
        head |= {"layers": self.layers, "experts": self.experts, "top_k": self.top_k}
        if self.periods is not None:
            head["period"] = periods_dict(self.periods)
        if self.costs is not None:
            head["costs"] = asdict(self.costs)
        if self.recommended:
            head["recommended"] = recommendations_list(self.recommended)
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
        periods = periods_from(content["period"]) if "period" in content else None
        costs = costs_from(content["costs"]) if "costs" in content else None
        best = recommendations_from(content.get("recommended", ()))
        shape = (layers, experts, top_k)
        return Profile(str(content["model"]), *shape, tasks, periods, costs, best)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"damaged profile: {error!r}", hint="make it again") from error


def _task_dict(task: TaskCounts) -> dict[str, Any]:
    popularity = {
        "choices": task.choices.tolist(),
        "weight": [[round(value, 2) for value in row] for row in task.weight.tolist()],
    }
    parts: dict[str, Any] = {"texts": task.texts, "tokens": task.tokens, "popularity": popularity}
    if task.words:
        kept = sorted(task.words, key=lambda token: (-task.words[token], token))[:WORDS]
        counts = {str(token): task.words[token] for token in kept}
        parts["words"] = {"total": task.words_total, "counts": counts}
    for name, lengths in (("answers", task.answers), ("continuations", task.continuations)):
        if lengths:
            parts[name] = {str(length): lengths[length] for length in sorted(lengths)}
    if task.sensitivity is not None:
        parts["sensitivity"] = sensitivity_dict(task.sensitivity)
    if task.transitions is not None:
        parts["transitions"] = transitions_dict(task.transitions, task.choices.shape[1])
    return parts


def _task_from(task: Any, shape: tuple[int, int]) -> TaskCounts:
    popularity = task["popularity"]
    choices = np.array(popularity["choices"], dtype=np.int64)
    weight = np.array(popularity["weight"], dtype=np.float32)
    if choices.shape != shape or weight.shape != shape or (choices < 0).any():
        raise ValueError(f"popularity is not {shape[0]} layers of {shape[1]} counts")
    if not (np.isfinite(weight).all() and (weight >= 0).all()):
        raise ValueError("a weight is negative, infinite or no number")
    words = task.get("words", {"total": 0, "counts": {}})
    return TaskCounts(
        int(task["texts"]),
        int(task["tokens"]),
        choices,
        weight,
        counts_from(words["counts"]),
        int(words["total"]),
        counts_from(task.get("answers", {})),
        counts_from(task.get("continuations", {})),
        sensitivity_from(task["sensitivity"]) if "sensitivity" in task else None,
        transitions_from(task["transitions"]) if "transitions" in task else None,
    )


def _either(left: Part | None, right: Part | None) -> Part | None:
    return right if left is None else left if right is None else left.plus(right)


def _words(profile: Profile) -> str:
    return f"{profile.layers} layers of {profile.experts} experts, top {profile.top_k}"
