"""Texts as the routing that they caused: counted, divided, in the order of a server's day."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from retinue.errors import UsageError
from retinue.policy.predict.shares import Shares, shares_of
from retinue.trace import Routed, TraceHead
from retinue.types import FloatArray

HELD_OUT = 0.2  # of each task's texts


class OfTask(Protocol):
    """Anything that is of a task, or of none."""

    @property
    def task(self) -> str | None:
        """Its name."""
        ...


Text = TypeVar("Text", bound=OfTask)


@dataclass(frozen=True, slots=True)
class RoutedText:
    """Routing weight of one text, summed over its tokens: [layers, experts] each."""

    task: str | None
    prompt: FloatArray
    answer: FloatArray

    @property
    def whole(self) -> FloatArray:
        """Prompt and answer together."""
        return self.prompt + self.answer


class Counted:
    """The popularity of some texts, as a profile made of them would have it."""

    def __init__(self, texts: Sequence[RoutedText]) -> None:
        assert texts, "no texts to count"
        self._sums: dict[str | None, FloatArray] = {}
        for text in texts:
            self._sums[text.task] = self._sums.get(text.task, 0) + text.whole
        self._all: FloatArray = sum(self._sums.values(), np.zeros_like(texts[0].whole))

    def shares(self, task: str | None) -> Shares:
        """Of `task`, or of all together: see `policy.base.Popularity`."""
        return shares_of(self._all if task is None else self._sums.get(task, self._all))

    def without(self, text: RoutedText, task: str | None) -> Shares:
        """The same as if `text` had not been counted; of all, where it is its task's only one."""
        sums = self._all if task is None else self._sums[task]
        rest = np.maximum(sums - text.whole, 0)
        everyone = shares_of(np.maximum(self._all - text.whole, 0))
        alone = rest.sum(axis=1, keepdims=True) < 1e-3
        return np.asarray(np.where(alone, everyone, shares_of(rest)))


def from_trace(head: TraceHead, requests: Iterable[Routed]) -> Iterator[RoutedText]:
    """The requests of a trace that have both a prompt and an answer, in their order."""
    for request in requests:
        if request.prompt_tokens and request.answer_tokens:
            prompt, answer = request.used(head), request.used(head, answer=True)
            yield RoutedText(request.task, prompt, answer)


def divide(texts: Sequence[Text], seed: int) -> tuple[list[Text], list[Text]]:
    """A fifth of each task's texts, drawn with `seed`, is held out: (to learn from, held out).

    Raises UsageError where a task has too few.
    """
    random = np.random.default_rng(seed)
    held: set[int] = set()
    for task in dict.fromkeys(text.task for text in texts):
        own = [at for at, text in enumerate(texts) if text.task == task]
        count = max(1, round(HELD_OUT * len(own)))
        if len(own) - count < 2:
            raise UsageError(
                f"too few texts {f'of `{task}`' if task else 'without a task'}: {len(own)}",
                hint="give at least 3 of each task to learn from",
            )
        held.update(random.permutation(own)[:count].tolist())
    learn = [text for at, text in enumerate(texts) if at not in held]
    return learn, [texts[at] for at in sorted(held)]


def mixed(texts: Sequence[RoutedText], seed: int) -> list[RoutedText]:
    """All texts in the order in which a server of many tasks would see them.

    As the paper's arrivals (arXiv 2503.06823, section 3.1): each prompt's task is drawn uniformly,
    here from those that have texts left. How many come at once, Poisson there, changes no order.
    """
    random = np.random.default_rng(seed)
    left: dict[str | None, list[RoutedText]] = {}
    for at in random.permutation(len(texts)).tolist():
        left.setdefault(texts[at].task, []).append(texts[at])
    order = []
    while left:
        task = sorted(left, key=str)[int(random.integers(len(left)))]
        order.append(left[task].pop())
        if not left[task]:
            del left[task]
    return order


def in_blocks(texts: Sequence[RoutedText]) -> list[RoutedText]:
    """All texts of one task, then all of the next."""
    return sorted(texts, key=lambda text: str(text.task))
