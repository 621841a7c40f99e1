"""Texts as the routing that they caused: recorded, divided, in the order of a server's day."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retinue.errors import UsageError
from retinue.model.scoring import LayerRouting, Scorer
from retinue.policy.predict.shares import Shares, shares_of
from retinue.types import FloatArray

HELD_OUT = 0.2  # of each task's texts


@dataclass(frozen=True, slots=True)
class RoutedText:
    """Routing weight of one text, summed over its tokens: [layers, experts] each."""

    task: str
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
        self._sums: dict[str, FloatArray] = {}
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


def record(
    scorer: Scorer, texts: Iterable[tuple[str, list[int], int]], shape: tuple[int, int]
) -> Iterator[RoutedText]:
    """Run `texts`, each a task, its ids and how many of these are the answer, in their order.

    shape: layers and experts. Raises what `Scorer.score` raises.
    """
    with scorer.recording(next_scores=False) as routing:
        for task, ids, scored in texts:
            scorer.score(ids, 1)
            parts = np.zeros((2, *shape), dtype=np.float32)
            for layer in routing:
                _count(parts, layer, len(ids) - scored)
            yield RoutedText(task, *parts)


def _count(parts: FloatArray, routing: LayerRouting, prompt_tokens: int) -> None:
    for part, rows in zip(parts, (slice(prompt_tokens), slice(prompt_tokens, None)), strict=True):
        experts, weights = routing.experts[rows], routing.weights[rows]
        valid = experts < part.shape[1]
        np.add.at(part[routing.layer], experts[valid], weights[valid])


def divide(texts: Sequence[RoutedText], seed: int) -> tuple[list[RoutedText], list[RoutedText]]:
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
                f"too few texts of `{task}` to learn from: {len(own)}",
                hint="give at least 3 of each task",
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
    left: dict[str, list[RoutedText]] = {}
    for at in random.permutation(len(texts)).tolist():
        left.setdefault(texts[at].task, []).append(texts[at])
    order = []
    while left:
        task = sorted(left)[int(random.integers(len(left)))]
        order.append(left[task].pop())
        if not left[task]:
            del left[task]
    return order


def in_blocks(texts: Sequence[RoutedText]) -> list[RoutedText]:
    """All texts of one task, then all of the next."""
    return sorted(texts, key=lambda text: text.task)


def rows_with_experts(texts: Sequence[RoutedText]) -> npt.NDArray[np.int64]:
    """The decoder layers that have experts."""
    return np.flatnonzero(sum(text.whole.sum(axis=1) for text in texts))
