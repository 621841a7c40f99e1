"""What a change of the resident experts costs: forecasting, deciding and moving."""

import time
from collections.abc import Sequence
from functools import partial

from retinue.config import format_size
from retinue.engine.evaluate import evaluate
from retinue.lab.base import NOTHING_YET, Chart, Column, Row, lines_by, number
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.workbench import Workbench

NAME = "refresh"
FORECASTERS = ("emoe-a", "emoe-l", "running-mean")
SHARES = (20, 40, 60)


def run(bench: Workbench) -> list[Row]:
    """One row for each forecaster and share."""
    shares = [share for share in SHARES if share in bench.settings.shares]
    return [
        row
        for forecaster in FORECASTERS
        for share in shares
        for row in bench.once(
            NAME, f"{forecaster}, {share} %", partial(_cell, bench, forecaster, share)
        )
    ]


def _cell(bench: Workbench, forecaster: str, share: int) -> list[Row]:
    plain = bench.plain
    with bench.opened(preset="emoe", forecaster=forecaster, experts=f"{share}%") as llm:
        metrics = llm.assembly.metrics
        count, moved, seconds = metrics.refreshes, metrics.refresh_bytes, metrics.refresh_s
        started = time.perf_counter()
        evaluate(llm.assembly, bench.texts, bench.check, plain)
        whole_s = time.perf_counter() - started
        count = metrics.refreshes - count
        moved, seconds = metrics.refresh_bytes - moved, metrics.refresh_s - seconds
        expert_bytes = llm.assembly.facts.read_bytes
    if not count:
        return []
    return [
        {
            "forecaster": forecaster,
            "share": share,
            "seconds": seconds / count,
            "experts": moved / count / expert_bytes,
            "bytes": moved / count,
            "of_time": seconds / whole_s,
            "refreshes": count,
            "texts": len(bench.texts),
        }
    ]


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Milliseconds of a refresh over the share."""
    timed = [row | {"ms": 1000 * (number(row, "seconds") or 0.0)} for row in rows]
    lines = lines_by(timed, "forecaster", "share", "ms")
    if not lines:
        return []
    return [Chart("Time of a refresh", "experts in memory, %", "milliseconds", lines)]


def verdict(rows: Sequence[Row]) -> str:
    """The dearest one."""
    if not rows:
        return NOTHING_YET
    worst = max(rows, key=lambda row: number(row, "seconds") or 0.0)
    milliseconds = 1000 * (number(worst, "seconds") or 0.0)
    most = max(number(row, "of_time") or 0.0 for row in rows)
    return (
        f"The dearest, {worst['forecaster']} with {worst['share']} % of the experts, takes"
        f" {milliseconds:.1f} ms and moves {worst['experts']:.0f} experts"
        f" ({format_size(number(worst, 'bytes') or 0)}); of the time of reading the texts all"
        f" refreshes take {most:.1%} at most."
    )


EXPERIMENT = Experiment(
    name=NAME,
    title="Cost of a refresh",
    claim=(
        "Predicting and moving take 0.33 to 0.38 s for eMoE-A (1.4 to 4.2 s for eMoE-L), which over"
        " 40 prompts is 0.24 to 0.47 % (1.7 to 3.1 %) of the time."
    ),
    columns=(
        Column("forecaster", "forecaster"),
        Column("share", "experts, %", ".0f"),
        Column("seconds", "a refresh, s", ".4f"),
        Column("experts", "experts moved", ".0f"),
        Column("bytes", "bytes moved", "bytes"),
        Column("of_time", "of the time", ".2%"),
        Column("refreshes", "refreshes", ".0f"),
        Column("texts", "texts", ".0f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=(
        "A refresh here is any change of the set: with another task's prompt as well, and not only"
        " once a period. The time of a text is that of one pass over it, without an answer: where"
        " texts are answered token by token, the share is smaller.",
    ),
)
