"""What `train-predictor` says of what it learnt: for a terminal, and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retinue.cli.terminal import table
from retinue.policy.predict.learned import Part, Worth
from retinue.train.predictors import Training
from retinue.train.scores import RESIDENT, Score

_BY_LAYER = ("left out", "bits")  # other figures than recall that there are for each layer


@dataclass(frozen=True, slots=True)
class Made:
    """What was learnt. `training` is of the networks, `baseline` what the parts compare with."""

    training: Training | None
    parts: dict[str, Part]
    baseline: Worth
    held_out: int
    train_s: float


def as_json(made: Made) -> dict[str, Any]:
    """`scores` of the networks; `parts` and `baseline` by kind and figure, mostly by layer."""
    scores = {} if made.training is None else made.training.scores
    return {
        "held_out": made.held_out,
        "scores": {
            order: {name: _score(found) for name, found in by_name.items()}
            for order, by_name in scores.items()
        },
        "parts": {kind: _lists(part.worth) for kind, part in made.parts.items()},
        "baseline": _lists(made.baseline),
    }


def _lists(worth: Worth) -> dict[str, list[float]]:
    return {name: list(values) for name, values in worth.items()}


def _score(found: Score) -> dict[str, Any]:
    by_layer = {key: getattr(found, key).tolist() for key in ("precision", "recall", "f1")}
    covered = {f"{share:.0%}": value for share, value in zip(RESIDENT, found.covered, strict=True)}
    return by_layer | {"covered": covered}


def as_text(made: Made, layers: Sequence[int]) -> str:
    """Tables; `layers` are those with experts."""
    shown = [] if made.training is None else _networks(made.training)
    if made.parts:
        shown += _parts(made, layers)
    return "\n\n".join(shown)


def _networks(training: Training) -> list[str]:
    shown = [_overview(order, scores) for order, scores in training.scores.items()]
    names = list(training.scores["mixed"])
    rows = [
        (layer, *(f"{training.scores['mixed'][name].f1[at]:.3f}" for name in names))
        for at, layer in enumerate(training.learned.rows.tolist())
    ]
    return [*shown, f"F1 by layer, tasks mixed\n{table(('layer', *names), rows)}"]


def _overview(order: str, scores: dict[str, Score]) -> str:
    shares = [f"{share:.0%}" for share in RESIDENT]
    rows = []
    for name, found in scores.items():
        means = (found.precision.mean(), found.recall.mean(), found.f1.mean())
        rows.append((name, *(f"{value:.3f}" for value in (*means, *found.covered))))
    what = "tasks mixed" if order == "mixed" else "one task after the other"
    head = ("forecaster", "precision", "recall", "F1", *shares)
    return f"held-out texts, {what}; routing weight covered by so many experts\n{table(head, rows)}"


def _parts(made: Made, layers: Sequence[int]) -> list[str]:
    recalls = dict(made.baseline)
    recalls |= {kind: p.worth["recall"] for kind, p in made.parts.items() if "recall" in p.worth}
    others = {
        f"{kind}: {name}": part.worth[name]
        for kind, part in made.parts.items()
        for name in _BY_LAYER
        if name in part.worth
    }
    single = [
        f"{kind}: {name} {values[0]:.4g}"
        for kind, part in made.parts.items()
        for name, values in part.worth.items()
        if len(values) == 1 and name not in (*_BY_LAYER, "recall", "precision", "f1", "accuracy")
    ]
    what = "of a token's experts, how many are among as many that were forecast for it"
    shown = [f"recall by layer, held-out texts: {what}\n{_by_layer(recalls, layers)}"]
    if others:
        shown.append(f"other figures by layer, held-out texts\n{_by_layer(others, layers)}")
    return [*shown, "\n".join(single)] if single else shown


def _by_layer(columns: Worth, layers: Sequence[int]) -> str:
    rows = [
        (layer, *(f"{values[at]:.3f}" if values[at] else "-" for values in columns.values()))
        for at, layer in enumerate(layers)
    ]
    means = [[value for value in values if value] for values in columns.values()]
    rows.append(("mean", *(f"{sum(m) / max(len(m), 1):.3f}" for m in means)))
    return table(("layer", *columns), rows)
