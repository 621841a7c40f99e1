"""Makes a predictor: on four fifths of the texts to see what it is worth, on all to be kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from retinue.policy.base import Popularity
from retinue.policy.predict.forecasters import LEARNED, NAMES, forecaster
from retinue.policy.predict.learned import LAYERWISE, Learned
from retinue.trace import TraceHead
from retinue.train.fit import fit
from retinue.train.scores import Score, score
from retinue.train.texts import (
    Counted,
    RoutedText,
    divide,
    in_blocks,
    mixed,
)


@dataclass(frozen=True, slots=True)
class Training:
    """A predictor that learnt from all texts, and how forecasters did before it saw all of them.

    scores: by the order of the held-out texts, `mixed` or `blocks`, and the forecaster's name.
    """

    learned: Learned
    scores: dict[str, dict[str, Score]]
    held_out: int


def train(
    head: TraceHead,
    texts: Sequence[RoutedText],
    kinds: Sequence[str],
    *,
    epochs: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Training:
    """Train the networks called `kinds`; `advance` is called after each of 2 * epochs * kinds.

    Raises UsageError where a task has too few texts.
    """
    part, held = divide(texts, seed)
    rows = np.array(head.routed)

    def learn(given: Sequence[RoutedText]) -> Learned:
        tasks = sorted({text.task for text in given if text.task is not None})
        networks = {
            kind: fit(
                given,
                rows,
                tasks,
                layerwise=LAYERWISE[kind],
                epochs=epochs,
                seed=seed,
                advance=advance,
            )
            for kind in kinds
        }
        shape = (head.layers, head.experts, head.top_k)
        return Learned(head.model, *shape, rows, tuple(tasks), len(given), {}, networks)

    scores = _compare(learn(part), Counted(part), held, seed)
    covered = {name: found.covered for name, found in scores["mixed"].items()}
    return Training(replace(learn(texts), held_out=covered), scores, len(held))


def _compare(
    learned: Learned, known: Popularity, held: Sequence[RoutedText], seed: int
) -> dict[str, dict[str, Score]]:
    names = [name for name in NAMES if name not in LEARNED or name in learned.networks]
    return {
        order: {
            name: score(forecaster(name, known, learned), stream, learned.rows) for name in names
        }
        for order, stream in {"mixed": mixed(held, seed), "blocks": in_blocks(held)}.items()
    }
