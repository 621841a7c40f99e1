"""How long the experts that were forecast from one prompt serve the prompts that follow."""

from collections.abc import Sequence
from functools import partial

from retinue.engine.evaluate import evaluate
from retinue.lab.base import NOTHING_YET, Chart, Column, Row, lines_by, number
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.workbench import Workbench

NAME = "period"
SHARE = 40
PERIODS = (1, 10, 20, 40, 60, 80)
FORECASTERS = ("previous-prompt", "emoe-a", "running-mean")


def run(bench: Workbench) -> list[Row]:
    """One row for each forecaster and period, as far as the texts can tell periods apart."""
    longest = [period for period in PERIODS if 2 * period <= len(bench.texts)]
    rows = []
    for forecaster in FORECASTERS:
        for period in longest:
            key = f"{forecaster}, every {period}"
            rows += bench.once(NAME, key, partial(_cell, bench, forecaster, period))
    return rows


def _cell(bench: Workbench, forecaster: str, period: int) -> list[Row]:
    settings = {"preset": "emoe", "forecaster": forecaster, "period": period}
    plain = bench.plain  # before this model is opened
    with bench.opened(experts=f"{SHARE}%", **settings) as llm:
        result = evaluate(llm.assembly, bench.texts, bench.check, plain)
    total = result.total
    return [
        {
            "forecaster": forecaster,
            "period": period,
            "added": total.nll - total.nll_plain,
            "agreement": total.agreement,
            "degraded_share": result.degraded_share,
            "bytes_read": result.bytes_read,
            "texts": len(bench.texts),
            "tokens": total.tokens,
        }
    ]


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Loss over the period."""
    lines = lines_by(rows, "forecaster", "period", "added")
    chart = Chart(
        "Loss added by the period", "prompts between two forecasts", "nats a token", lines
    )
    return [chart] if lines else []


def verdict(rows: Sequence[Row]) -> str:
    """How much the longest period costs over the shortest, for each forecaster."""
    parts = []
    for name in dict.fromkeys(str(row["forecaster"]) for row in rows):
        mine = {number(row, "period") or 0.0: row for row in rows if row["forecaster"] == name}
        if len(mine) > 1:
            first, last = mine[min(mine)], mine[max(mine)]
            parts.append(
                f"{name} {first['added']:+.3f} every {first['period']} and"
                f" {last['added']:+.3f} every {last['period']}"
            )
    if not parts:
        return NOTHING_YET
    return (
        f"Loss added, in nats a token, with {SHARE} % of the experts, by prompts from one forecast"
        f" to the next: {'; '.join(parts)}."
    )


EXPERIMENT = Experiment(
    name=NAME,
    title="Prompts between two forecasts",
    claim=(
        "Perplexity is flat when the experts of one prompt are used for up to 40 more, and rises"
        " from 60: a forecast every 40 prompts is enough."
    ),
    columns=(
        Column("forecaster", "forecaster"),
        Column("period", "every", ".0f"),
        Column("added", "loss added", "+.4f"),
        Column("agreement", "agreement", ".3f"),
        Column("degraded_share", "degraded", ".1%"),
        Column("bytes_read", "read", "bytes"),
        Column("texts", "texts", ".0f"),
        Column("tokens", "tokens", ".0f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=(
        "Preset `emoe`. Tasks alternate in the order of the file; the set follows the task of the"
        " request with each prompt, the period is that of its tables alone. A forecast comes early"
        " where prompts are served clearly worse than the last one said.",
        "Periods of which the texts hold less than two are left out.",
    ),
)
