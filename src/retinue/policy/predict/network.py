"""The small sequence model behind eMoE's predictors, run in numpy; `train/network.py` trains it.

A transformer with one position for each layer that has experts: it reads shares of routing weight
and corrects what the profile says. The paper (arXiv 2503.06823, section 3.3) fine-tunes XLNet, 108
million weights, on expert numbers written as digits. Deviations: this one has some ten thousand
weights and is trained from nothing, on shares instead of digits, which says the same of a prompt
without making up an order of its experts; and it begins at the profile's popularity, so that what
it has not learnt costs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from retinue.policy.predict.shares import Shares
from retinue.types import FloatArray

HEADS = 4
NORM_FLOOR = 1e-6
PRIOR_FLOOR = 1e-3  # of a share: what was never seen is not impossible
# Beside these, `query`, `key`, `value`, `mix`, `widen` and `narrow` of each block, numbered.
OUTER = ("read", "place", "task", "say")
INNER = ("query", "key", "value", "mix", "widen", "narrow")


def shapes(
    layers: int, experts: int, tasks: int, width: int, blocks: int
) -> dict[str, tuple[int, ...]]:
    """The shape of every array by its name. The last row of `task` is that of unknown tasks."""
    found: dict[str, tuple[int, ...]] = {
        "read": (layers, experts, width),
        "place": (layers, width),
        "task": (tasks + 1, width),
        "say": (layers, width, experts),
    }
    for block in range(blocks):
        for name in INNER:
            tall, wide = 4 if name == "narrow" else 1, 4 if name == "widen" else 1
            found[f"{name}{block}"] = (tall * width, wide * width)
    return found


def blocks_of(arrays: Mapping[str, object]) -> int:
    """How many blocks the arrays are of."""
    return (len(arrays) - len(OUTER)) // len(INNER)


@dataclass(frozen=True, slots=True)
class Network:
    """Weights by name, as `shapes` says. `layerwise`: a layer sees those before it, not itself."""

    arrays: Mapping[str, FloatArray]
    layerwise: bool

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return blocks_of(self.arrays)

    def shares(self, seen: Shares, prior: Shares, task: int) -> Shares:
        """What is to be expected after `seen`, both [layers with experts, experts].

        task: its row in `task`. prior: what the profile says of the prompt to come.
        """
        arrays = self.arrays
        if self.layerwise:
            seen = np.concatenate([np.zeros_like(seen[:1]), seen[:-1]])
        rows = np.einsum("le,led->ld", np.sqrt(seen), arrays["read"])
        rows = rows + arrays["place"] + arrays["task"][task]
        for block in range(self.blocks):
            weights = {name: arrays[f"{name}{block}"] for name in INNER}
            rows = rows + _attend(_norm(rows), weights, self.layerwise)
            wide = np.maximum(_norm(rows) @ weights["widen"], 0)
            rows = rows + wide @ weights["narrow"]
        logits = np.log(prior + PRIOR_FLOOR) + np.einsum("ld,lde->le", _norm(rows), arrays["say"])
        return _softmax(logits)


def _attend(rows: Shares, weights: Mapping[str, FloatArray], layerwise: bool) -> Shares:
    length, width = rows.shape
    query, key, value = (
        (rows @ weights[name]).reshape(length, HEADS, -1).swapaxes(0, 1)
        for name in ("query", "key", "value")
    )  # [heads, layers, width of a head]
    scores = query @ key.swapaxes(1, 2) / np.sqrt(width // HEADS)
    if layerwise:
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    mixed = _softmax(scores) @ value
    return np.asarray(mixed.swapaxes(0, 1).reshape(length, width) @ weights["mix"])


def _norm(rows: Shares) -> Shares:
    return np.asarray(rows / np.sqrt((rows**2).mean(axis=-1, keepdims=True) + NORM_FLOOR))


def _softmax(scores: Shares) -> Shares:
    grown = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=-1, keepdims=True))
