"""Which experts of the next layer follow an expert, and how alike consecutive prompts are.

Counted while texts run, kept sparsely: of each two layers the most frequent pairs, as many as a
layer has experts, so that a profile of a large model stays readable. Sums of what was kept are
a little too small; the order of the frequent pairs stays right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from retinue.types import FloatArray, IntArray

Pair = tuple[int, int, int]  # layer, expert, expert of the next layer that has experts


@dataclass(frozen=True, slots=True)
class Transitions:
    """How often expert pairs of consecutive layers served the same token, and three likenesses.

    `layers` is Cramer's V (corrected for bias) of the experts of consecutive layers: 0 where they
    tell nothing of each other, 1 where one fixes the other. `prompts` is the correlation of the
    expert shares of consecutive prompts of the task, `overlap` how much of their weight they
    have in common. Means over `texts`. The paper's (arXiv 2503.06823) are 0.5, and 0.4 to 0.95.
    """

    texts: int
    layers: float
    prompts: float
    overlap: float
    pairs: Mapping[Pair, int]

    def plus(self, other: "Transitions") -> "Transitions":
        """The counts of both, and means weighted by texts."""
        texts = self.texts + other.texts
        own = self.texts / max(texts, 1)
        pairs = dict(self.pairs)
        for pair, count in other.pairs.items():
            pairs[pair] = pairs.get(pair, 0) + count
        return Transitions(
            texts,
            own * self.layers + (1 - own) * other.layers,
            own * self.prompts + (1 - own) * other.prompts,
            own * self.overlap + (1 - own) * other.overlap,
            pairs,
        )

    def following(self, layer: int, expert: int) -> dict[int, int]:
        """How often each expert of the next layer followed this one, as far as it is kept."""
        found = self.pairs.items()
        return {pair[2]: count for pair, count in found if pair[:2] == (layer, expert)}


class TransitionCounter:
    """Counts one task's texts; `routed` are its layers with experts, in order."""

    def __init__(self, routed: tuple[int, ...], experts: int) -> None:
        self._routed, self._experts = routed, experts
        gaps = max(len(routed) - 1, 0)
        self._counts = np.zeros((gaps, experts * experts), np.int32)
        self._last: FloatArray | None = None
        self._likeness: list[tuple[float, float]] = []
        self._texts = 0

    def add(self, experts: IntArray, used: FloatArray) -> None:
        """Count one text: experts [tokens, routed, k], and the weight of each [routed, experts]."""
        size = self._experts
        for gap in range(len(self._counts)):
            here, there = experts[:, gap, :, None], experts[:, gap + 1, None, :]
            codes = (here * size + there)[(here < size) & (there < size)]
            self._counts[gap] += np.bincount(codes, minlength=size * size).astype(np.int32)
        shares = used / np.maximum(used.sum(axis=1, keepdims=True), 1e-9)
        if self._last is not None:
            self._likeness.append(_likeness(self._last, shares))
        self._last = shares
        self._texts += 1

    def result(self) -> Transitions:
        """What was counted, the most frequent pairs of each two layers."""
        pairs: dict[Pair, int] = {}
        for gap, row in enumerate(self._counts):
            for code in np.argsort(-row, kind="stable")[: self._experts].tolist():
                if row[code]:
                    pair = (self._routed[gap], code // self._experts, code % self._experts)
                    pairs[pair] = int(row[code])
        size = self._experts
        tied = [_cramer(row.reshape(size, size).astype(np.int64)) for row in self._counts]
        likeness = np.mean(self._likeness, axis=0) if self._likeness else np.zeros(2)
        layers = float(np.mean(tied)) if tied else 0.0
        return Transitions(self._texts, layers, float(likeness[0]), float(likeness[1]), pairs)


def transitions_dict(value: Transitions, experts: int) -> dict[str, Any]:
    """JSON-shaped: by layer and expert, of each two layers the `experts` most frequent pairs."""
    tables: dict[str, dict[str, dict[str, int]]] = {}
    kept: dict[int, int] = {}
    ordered = sorted(value.pairs.items(), key=lambda item: (item[0][0], -item[1], item[0]))
    for (layer, expert, following), count in ordered:
        kept[layer] = kept.get(layer, 0) + 1
        if kept[layer] <= experts:
            row = tables.setdefault(str(layer), {}).setdefault(str(expert), {})
            row[str(following)] = count
    return {
        "texts": value.texts,
        "layers": round(value.layers, 4),
        "prompts": round(value.prompts, 4),
        "overlap": round(value.overlap, 4),
        "following": tables,
    }


def transitions_from(content: Any) -> Transitions:
    """The part in a JSON document. Raises KeyError, TypeError or ValueError for what is none."""
    pairs = {
        (int(layer), int(expert), int(following)): int(count)
        for layer, table in dict(content["following"]).items()
        for expert, row in dict(table).items()
        for following, count in dict(row).items()
    }
    layers, prompts, overlap = (float(content[name]) for name in ("layers", "prompts", "overlap"))
    return Transitions(int(content["texts"]), layers, prompts, overlap, pairs)


def _likeness(left: FloatArray, right: FloatArray) -> tuple[float, float]:
    """Correlation and common weight of two prompts' shares [routed, experts], mean over layers."""
    a = left - left.mean(axis=1, keepdims=True)
    b = right - right.mean(axis=1, keepdims=True)
    spread = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    correlation = (a * b).sum(axis=1) / np.maximum(spread, 1e-12)
    return float(correlation.mean()), float(np.minimum(left, right).sum(axis=1).mean())


def _cramer(table: IntArray) -> float:
    """Cramer's V of a table of counts, with Bergsma's correction for bias (2013)."""
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    total = float(table.sum())
    if total < 2 or min(table.shape) < 2:
        return 0.0
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)).astype(np.float64)
    phi = float((table.astype(np.float64) ** 2 / expected).sum()) - 1
    rows, columns = table.shape
    phi = max(0.0, phi - (rows - 1) * (columns - 1) / (total - 1))
    room = min(size - (size - 1) ** 2 / (total - 1) for size in (rows, columns)) - 1
    return float(min(1.0, np.sqrt(phi / room))) if room > 0 else 0.0
