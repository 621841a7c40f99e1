"""Trains one network on pairs of consecutive prompts.

A server sees streams in which the tasks mix, and streams in which they do not: half of the pairs
are of two texts of the same task, half of a text and any other, as the paper's uniform draw of
tasks gives; layer by layer all are of the same task, as the first layer is copied from there. What
the profile says is counted without the text to be forecast, as it is when a text is new. Of each
sixth pair or so the task is withheld, so that a request without one is served too.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from retinue.policy.predict.network import Network
from retinue.policy.predict.shares import Shares, shares_of
from retinue.train.network import fresh, logits
from retinue.train.texts import Counted, RoutedText
from retinue.types import IntArray

EPOCHS = 20  # an epoch takes each text twice
BATCH = 32
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
SAME_TASK = 0.5  # of the pairs
WITHOUT_TASK = 0.15


class _Pairs:
    """Draws batches; `rows` are the layers with experts."""

    def __init__(
        self, texts: Sequence[RoutedText], rows: IntArray, tasks: Sequence[str], seed: int
    ) -> None:
        self._texts, self._rows, self._tasks = texts, rows, tasks
        self._counted = Counted(texts)
        self._random = np.random.default_rng(seed)
        self._prompts = np.stack([shares_of(text.prompt) for text in texts])
        self._wholes = np.stack([shares_of(text.whole) for text in texts])
        self._own: dict[str | None, list[int]] = {}
        for at, text in enumerate(texts):
            self._own.setdefault(text.task, []).append(at)

    def draw(self, layerwise: bool) -> tuple[torch.Tensor, ...]:
        """What was seen, what the profile says, the task's row, and what is to be forecast."""
        at = self._random.integers(len(self._texts), size=BATCH)
        known = self._random.random(BATCH) >= WITHOUT_TASK
        prior = np.stack([self._prior(text, told) for text, told in zip(at, known, strict=True)])
        target = self._wholes[at]
        same = self._random.random(BATCH) < (1 if layerwise else SAME_TASK)
        before = [self._before(*pair) for pair in zip(at, same, strict=True)]
        seen = self._prompts[before]
        if layerwise:
            # After the first layer serving reads its own forecasts: between profile and truth.
            truth = self._random.random((BATCH, 1, 1))
            own = truth * target + (1 - truth) * prior
            seen = np.where(np.arange(seen.shape[1])[:, None] == self._rows[0], seen, own)
        rows = [self._row(self._texts[text].task) for text in at]
        row = np.where(known, rows, len(self._tasks))
        return (
            *(self._tensor(part) for part in (seen, prior)),
            torch.tensor(row),
            self._tensor(target),
        )

    def _row(self, task: str | None) -> int:
        return len(self._tasks) if task is None else self._tasks.index(task)

    def _prior(self, at: int, known: bool) -> Shares:
        text = self._texts[at]
        return self._counted.without(text, text.task if known else None)

    def _before(self, at: int, same: bool) -> int:
        choice = self._own[self._texts[at].task] if same else range(len(self._texts))
        return choice[int(self._random.integers(len(choice)))]

    def _tensor(self, shares: Shares) -> torch.Tensor:
        return torch.tensor(shares[:, self._rows], dtype=torch.float32)


def fit(
    texts: Sequence[RoutedText],
    rows: IntArray,
    tasks: Sequence[str],
    *,
    layerwise: bool,
    epochs: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Network:
    """A network that forecasts each text of `texts` from another's prompt; same seed, same network.

    Cross-entropy between the forecast and the shares of the text's routing weight, AdamW, a cosine
    schedule. `advance` is called after each epoch and may raise to stop.
    """
    pairs = _Pairs(texts, rows, tasks, seed)
    experts = texts[0].whole.shape[1]
    arrays = fresh(len(rows), experts, len(tasks), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(
        arrays.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98)
    )
    steps = max(1, 2 * len(texts) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for _ in range(steps):
            seen, prior, task, target = pairs.draw(layerwise)
            scores = logits(arrays, seen, prior, task, layerwise=layerwise)
            loss = -(target * scores.log_softmax(dim=-1)).sum(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        advance()
    return Network({name: array.detach().numpy() for name, array in arrays.items()}, layerwise)
