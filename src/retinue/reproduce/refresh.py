"""What a change of the resident experts costs: deciding and moving, once every some prompts."""

import statistics
import time
from collections.abc import Sequence
from functools import partial

from retinue.config import format_size
from retinue.reproduce.base import NOTHING_YET, Chart, Column, Experiment, Row, Series, number
from retinue.reproduce.workbench import Workbench

NAME = "refresh"
PRESET = "popular-by-task"
SHARES = (20, 40, 60)
PERIOD = 40  # prompts, the paper's


def run(bench: Workbench) -> list[Row]:
    """One row for each share: all changes from one task of the texts to the next."""
    return [
        row
        for share in SHARES
        for row in bench.once(NAME, f"{share} %", partial(_cell, bench, share))
    ]


def _cell(bench: Workbench, share: int) -> list[Row]:
    prompt_s = statistics.median(answer.seconds for answer in bench.plain_answers)
    seconds, moved = [], []
    with bench.opened(preset=PRESET, experts=f"{share}%") as llm:
        residents = llm.assembly.residents
        assert residents is not None
        residents.begin([bench.texts[0].task])
        before = bench.texts[0].task
        for text in bench.texts[1:]:
            bench.check()
            started = time.perf_counter()
            read = residents.begin([text.task])
            if text.task != before:
                seconds.append(time.perf_counter() - started)
                moved.append(read)
            before = text.task
        expert_bytes = llm.assembly.facts.read_bytes
    if not seconds:
        return []
    middle = statistics.median(seconds)
    return [
        {
            "share": share,
            "refreshes": len(seconds),
            "seconds": middle,
            "seconds_low": min(seconds),
            "seconds_high": max(seconds),
            "bytes": statistics.median(moved),
            "experts": statistics.median(moved) / expert_bytes,
            "prompt_s": prompt_s,
            "amortised": middle / (PERIOD * prompt_s),
        }
    ]


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Seconds of a refresh over the share."""
    x = [number(row, "share") or 0.0 for row in rows]
    y, low, high = (
        [number(row, key) for row in rows] for key in ("seconds", "seconds_low", "seconds_high")
    )
    line = Series(PRESET, x, y, low, high)
    return [Chart("Time of a refresh", "experts in memory, %", "seconds", [line])] if rows else []


def verdict(rows: Sequence[Row]) -> str:
    """The dearest share."""
    if not rows:
        return NOTHING_YET
    worst = max(rows, key=lambda row: number(row, "seconds") or 0.0)
    return (
        f"A refresh takes at most {max(number(row, 'seconds_high') or 0 for row in rows):.3f} s;"
        f" with {worst['share']} % of the experts {worst['seconds']:.3f} s in the middle, for"
        f" {worst['experts']:.0f} experts ({format_size(number(worst, 'bytes') or 0)}). Over"
        f" {PERIOD} prompts that is {worst['amortised']:.2%} of the time of their answers."
    )


EXPERIMENT = Experiment(
    name=NAME,
    title="Cost of a refresh",
    claim=(
        "Predicting and moving take 0.33 to 0.38 s for eMoE-A (1.4 to 4.2 s for eMoE-L), which over"
        " 40 prompts is 0.24 to 0.47 % (1.7 to 3.1 %) of the time."
    ),
    columns=(
        Column("share", "experts, %", ".0f"),
        Column("seconds", "a refresh, s", ".4f", "seconds_low", "seconds_high"),
        Column("experts", "experts moved", ".0f"),
        Column("bytes", "bytes moved", "bytes"),
        Column("amortised", "of the time", ".2%"),
        Column("refreshes", "refreshes", ".0f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=("Seconds are a median with the least and the most.",),
)
