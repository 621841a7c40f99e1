"""Which tasks bear wrong routing, and in how many layers: what the profile has measured."""

from collections.abc import Mapping, Sequence
from functools import partial

from retinue.lab.base import NOTHING_YET, Chart, Column, Row, lines_by, number
from retinue.model.profiles import find_profile
from retinue.policy.measured import Damage
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.workbench import Workbench

NAME = "sensitivity"
SIDES = {"first": "from the input side", "last": "from the output side"}
BEARABLE = 0.8  # agreement, to say who bears what


def run(bench: Workbench) -> list[Row]:
    """One row for each task, side and number of random layers that the profile knows."""
    return bench.once(NAME, "the profile", partial(_known, bench))


def _known(bench: Workbench) -> list[Row]:
    profile = find_profile(bench.folder, bench.facts, bench.config.profile)
    rows: list[Row] = []
    for task, counts in profile.tasks.items():
        if counts.sensitivity is not None:
            for side, name in SIDES.items():
                damage: Mapping[int, Damage] = getattr(counts.sensitivity, side)
                rows += [_row(task, name, damage, at, profile.layers) for at in sorted(damage)]
    return rows


def _row(task: str, side: str, damage: Mapping[int, Damage], at: int, layers: int) -> Row:
    found = damage[at]
    return {
        "task": task,
        "side": side,
        "layers": at,
        "exact": 100 * (1 - at / layers),
        "agreement": found.agreement,
        "added": found.added_nll,
        "texts": found.texts,
    }


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Agreement over the share of layers that are exact, a plot for each side."""
    found = []
    for side in SIDES.values():
        mine = [row for row in rows if row["side"] == side]
        lines = lines_by(mine, "task", "exact", "agreement")
        if lines:
            title = f"Routing made random {side}"
            found.append(Chart(title, "layers with exact routing, %", "agreement", lines))
    return found


def verdict(rows: Sequence[Row]) -> str:
    """The tasks that bear the most and the least, for each side."""
    parts = []
    for side in dict.fromkeys(str(row["side"]) for row in rows):
        mine = [row for row in rows if row["side"] == side]
        all_random = max(number(row, "layers") or 0 for row in mine)
        worst = [row for row in mine if row["layers"] == all_random]
        best = max(worst, key=lambda row: number(row, "agreement") or 0)
        least = min(worst, key=lambda row: number(row, "agreement") or 0)
        half = [row for row in mine if number(row, "exact") == 50]
        fine = sum((number(row, "agreement") or 0) >= BEARABLE for row in half)
        middle = f"; with half of the layers exact, {fine} of {len(half)} tasks keep {BEARABLE:.0%}"
        parts.append(
            f"{side}, with {all_random:.0f} layers random {best['task']} keeps the most next tokens"
            f" ({best['agreement']:.0%}), {least['task']} the fewest ({least['agreement']:.0%})"
            f"{middle if half else ''}"
        )
    return f"Random {'. Random '.join(parts)}." if parts else NOTHING_YET


EXPERIMENT = Experiment(
    name=NAME,
    title="Sensitivity to wrong routing",
    claim=(
        "With random routing in all layers classification and comparison keep a similarity above"
        " 90 %; question answering keeps 80 % with half of the layers exact, summaries fall below"
        " it there, and conversations even with three quarters exact."
    ),
    columns=(
        Column("task", "task"),
        Column("side", "random"),
        Column("layers", "layers", ".0f"),
        Column("exact", "exact, %", ".0f"),
        Column("agreement", "agreement", ".3f"),
        Column("added", "loss added", "+.3f"),
        Column("texts", "texts", ".0f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=(
        "Measured by `retinue profile`, on the texts that the profile was made of; here it is only"
        " read. Agreement of the next token, teacher-forced, takes the place of similarity. The"
        " paper makes layers random from the input side only.",
    ),
)
