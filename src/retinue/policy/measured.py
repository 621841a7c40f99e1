"""What a profile holds beside counts of experts, and how two of the same kind add up.

It knows no files and no models. Every part has a JSON shape; what is missing in a file is unknown.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

EXACT_LENGTHS = (
    100  # answers of up to so many tokens are counted exactly, longer ones to two digits
)

Counts = Mapping[int, int]


@dataclass(frozen=True, slots=True)
class OutputTokens:
    """How many tokens a task's answers have."""

    mean: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """What work costs on one machine, in seconds: two straight lines, by least squares.

    A pass over `n` tokens takes `base_s + n * token_s` where every expert is resident, reading
    `n` experts `load_base_s + n * load_s`. `machine` says where this was measured.
    """

    base_s: float
    token_s: float
    load_base_s: float
    load_s: float
    machine: str = ""


@dataclass(frozen=True, slots=True)
class Damage:
    """What wrong routing did: the share of next tokens that stayed, and nats a token added."""

    texts: int
    agreement: float
    added_nll: float

    def plus(self, other: "Damage") -> "Damage":
        """The mean of both, weighted by texts."""
        texts = self.texts + other.texts
        own = self.texts / max(texts, 1)
        return Damage(
            texts,
            own * self.agreement + (1 - own) * other.agreement,
            own * self.added_nll + (1 - own) * other.added_nll,
        )


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What random routing does to a task, by how many layers it begins or ends with, or by layer.

    `first[n]` is with the first `n` decoder layers random, as eMoE (arXiv 2503.06823, section
    3.3) does it; `last[n]` with the last `n`; `alone[n]` with layer `n` only. Layers count as
    insensitive where the agreement stays at `above` or more. Deviation: the paper compares the
    meaning of whole answers.
    """

    above: float
    first: Mapping[int, Damage] = field(default_factory=dict)
    last: Mapping[int, Damage] = field(default_factory=dict)
    alone: Mapping[int, Damage] = field(default_factory=dict)

    def insensitive(self, layers: int) -> range:
        """The layers that random routing may have, of the side that allows more of them.

        The two sides were not tried together, so only one of them counts.
        """
        first, last = self._depth(self.first), self._depth(self.last)
        return range(first) if first >= last else range(layers - last, layers)

    def plus(self, other: "Sensitivity") -> "Sensitivity":
        """The means of both, weighted by texts; `above` is the stricter one."""
        above = max(self.above, other.above)
        return Sensitivity(
            above,
            _both(self.first, other.first),
            _both(self.last, other.last),
            _both(self.alone, other.alone),
        )

    def _depth(self, side: Mapping[int, Damage]) -> int:
        deepest = 0
        for depth in sorted(side):
            if side[depth].agreement < self.above:
                break
            deepest = depth
        return deepest


@dataclass(frozen=True, slots=True)
class Periods:
    """What a resident set that is chosen anew every `n` prompts degrades: shares by `n`.

    `best` is the longest period whose share is within `tolerance` of the shortest one's.
    """

    texts: int
    tolerance: float
    degraded: Mapping[int, float]

    @property
    def best(self) -> int | None:
        """The longest period that is good enough; None where nothing was measured."""
        best = None
        for period in sorted(self.degraded):
            if self.degraded[period] > self.degraded[min(self.degraded)] + self.tolerance:
                break
            best = period
        return best

    def plus(self, other: "Periods") -> "Periods":
        """The means of both over the periods that both know, weighted by texts."""
        texts = self.texts + other.texts
        own = self.texts / max(texts, 1)
        degraded = {
            period: own * self.degraded[period] + (1 - own) * other.degraded[period]
            for period in self.degraded
            if period in other.degraded
        }
        return Periods(texts, max(self.tolerance, other.tolerance), degraded)


def add_counts(left: Counts, right: Counts) -> dict[int, int]:
    """The counts of both."""
    return {key: left.get(key, 0) + right.get(key, 0) for key in {**left, **right}}


def rounded_length(tokens: int) -> int:
    """`tokens`, to two digits where it is long: so that a profile does not grow for ever."""
    if tokens <= EXACT_LENGTHS:
        return tokens
    unit = int(10 ** (len(str(tokens)) - 2))
    return round(tokens / unit) * unit


def output_tokens(lengths: Counts) -> OutputTokens | None:
    """Mean and percentiles of lengths by how often they occurred; None without any."""
    total = sum(lengths.values())
    if not total:
        return None
    ordered = sorted(lengths)
    reached = list(accumulate(lengths[length] for length in ordered))
    mean = sum(length * count for length, count in lengths.items()) / total
    p50, p90 = (
        next(length for length, so_far in zip(ordered, reached, strict=True) if so_far >= share)
        for share in (0.5 * total, 0.9 * total)
    )
    return OutputTokens(mean, float(p50), float(p90))


def sensitivity_dict(value: Sensitivity) -> dict[str, Any]:
    """JSON-shaped."""
    return {
        "above": value.above,
        "first": {str(depth): _damage_dict(damage) for depth, damage in value.first.items()},
        "last": {str(depth): _damage_dict(damage) for depth, damage in value.last.items()},
        "alone": {str(layer): _damage_dict(damage) for layer, damage in value.alone.items()},
    }


def sensitivity_from(content: Any) -> Sensitivity:
    """The part in a JSON document. Raises KeyError, TypeError or ValueError for what is none."""
    return Sensitivity(
        float(content["above"]),
        *(
            {
                int(depth): Damage(
                    int(row["texts"]), float(row["agreement"]), float(row["added_nll"])
                )
                for depth, row in dict(content.get(side, {})).items()
            }
            for side in ("first", "last", "alone")
        ),
    )


def periods_dict(value: Periods) -> dict[str, Any]:
    """JSON-shaped; `best` is there for the reader's eye."""
    degraded = {str(period): round(share, 6) for period, share in value.degraded.items()}
    head = {"best": value.best, "texts": value.texts, "tolerance": value.tolerance}
    return head | {"degraded": degraded}


def periods_from(content: Any) -> Periods:
    """The part in a JSON document. Raises KeyError, TypeError or ValueError for what is none."""
    degraded = {int(key): float(share) for key, share in dict(content["degraded"]).items()}
    if any(period < 1 for period in degraded):
        raise ValueError("a period is less than one prompt")
    return Periods(int(content["texts"]), float(content["tolerance"]), degraded)


def costs_from(content: Any) -> MachineCosts:
    """The part in a JSON document. Raises KeyError, TypeError or ValueError for what is none."""
    return MachineCosts(
        float(content["base_s"]),
        float(content["token_s"]),
        float(content["load_base_s"]),
        float(content["load_s"]),
        str(content["machine"]),
    )


def counts_from(content: Any) -> dict[int, int]:
    """Counts by number in a JSON document. Raises TypeError or ValueError for what is none."""
    counts = {int(key): int(count) for key, count in dict(content).items()}
    if any(count < 0 for count in counts.values()):
        raise ValueError("a count is negative")
    return counts


def _both(left: Mapping[int, Damage], right: Mapping[int, Damage]) -> dict[int, Damage]:
    merged = dict(left)
    for depth, damage in right.items():
        merged[depth] = merged[depth].plus(damage) if depth in merged else damage
    return dict(sorted(merged.items()))


def _damage_dict(damage: Damage) -> dict[str, Any]:
    rounded = {"agreement": round(damage.agreement, 4), "added_nll": round(damage.added_nll, 4)}
    return asdict(damage) | rounded
