"""Wrong task labels: what they cost in quality and in time."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from random import Random

from retinue.engine.evaluate import evaluate
from retinue.engine.tasks import TaskIds
from retinue.lab.base import NOTHING_YET, Chart, Column, Row, lines_by, number
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.workbench import Workbench

NAME = "labels"
PRESET, SHARE = "emoe", 40
WRONG = (0, 20, 40, 60, 80, 100)  # percent
SEED = 0


def run(bench: Workbench) -> list[Row]:
    """One row for each share of wrong labels."""
    return [
        row
        for wrong in WRONG
        for row in bench.once(NAME, f"{wrong} % wrong", partial(_cell, bench, wrong))
    ]


def mislabelled(texts: Sequence[TaskIds], wrong: int) -> list[TaskIds]:
    """The texts, of which `wrong` percent, drawn with a fixed seed, have another task's name."""
    names = sorted({text.task for text in texts})
    if len(names) < 2:
        return list(texts)
    chance = Random(SEED)
    order = chance.sample(range(len(texts)), len(texts))
    chosen = set(order[: round(len(texts) * wrong / 100)])
    found = []
    for at, text in enumerate(texts):
        other = chance.choice([name for name in names if name != text.task])
        found.append(replace(text, task=other) if at in chosen else text)
    return found


def _cell(bench: Workbench, wrong: int) -> list[Row]:
    texts, plain = mislabelled(bench.texts, wrong), bench.plain  # before this model is opened
    with bench.opened(preset=PRESET, experts=f"{SHARE}%") as llm:

        def text_s(read: Sequence[TaskIds]) -> float:
            started = time.perf_counter()
            evaluate(llm.assembly, read, bench.check, plain)
            return (time.perf_counter() - started) / len(read)

        result = evaluate(llm.assembly, texts, bench.check, plain)  # before it learns from them
        # In turn: from one cell to the next the machine itself may be a fifth slower.
        pairs = [(text_s(bench.texts), text_s(texts)) for _ in range(bench.settings.repeats)]
    total, seconds = result.total, [wrong_s for _, wrong_s in pairs]
    return [
        {
            "wrong": wrong,
            "added": total.nll - total.nll_plain,
            "agreement": total.agreement,
            "degraded_share": result.degraded_share,
            "prompt_s": statistics.median(seconds),
            "prompt_low_s": min(seconds),
            "prompt_high_s": max(seconds),
            "slower": statistics.median(wrong_s / right_s for right_s, wrong_s in pairs) - 1,
            "read_per_prompt": result.bytes_read / len(texts),
            "texts": len(texts),
        }
    ]


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Loss and time over the share of wrong labels."""
    named = [row | {"what": PRESET} for row in rows]
    x, spread = "wrong labels, %", ("prompt_low_s", "prompt_high_s")
    loss = lines_by(named, "what", "wrong", "added")
    times = lines_by(named, "what", "wrong", "prompt_s", spread)
    if not named:
        return []
    return [
        Chart("Loss added", x, "nats a token", loss),
        Chart("Time of a text", x, "seconds", times),
    ]


def verdict(rows: Sequence[Row]) -> str:
    """What a fifth of wrong labels, and all of them, change."""
    by_share = {row["wrong"]: row for row in rows}
    right, fifth, all_wrong = (by_share.get(wrong) for wrong in (0, 20, 100))
    if right is None or fifth is None or all_wrong is None:
        return NOTHING_YET
    return (
        f"With 20 % wrong labels a text takes {_slower(fifth)} and the loss added goes from"
        f" {right['added']:+.3f} to {fifth['added']:+.3f} nats a token; with all labels wrong it"
        f" takes {_slower(all_wrong)}, and the loss added is {all_wrong['added']:+.3f}."
    )


def _slower(row: Row) -> str:
    change = number(row, "slower") or 0.0
    return f"{abs(change):.1%} {'more' if change > 0 else 'less'} time"


EXPERIMENT = Experiment(
    name=NAME,
    title="Wrong task labels",
    claim=(
        "20 % wrong labels change the latency by less than 10 %, even on the largest model; beyond"
        " that it stays where it is."
    ),
    columns=(
        Column("wrong", "wrong labels, %", ".0f"),
        Column("added", "loss added", "+.3f"),
        Column("agreement", "agreement", ".3f"),
        Column("degraded_share", "degraded", ".1%"),
        Column("prompt_s", "a text, s", ".3f", "prompt_low_s", "prompt_high_s"),
        Column("slower", "more time", "+.1%"),
        Column("read_per_prompt", "read a text", "bytes"),
        Column("texts", "texts", ".0f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=(
        f"Preset `{PRESET}` with {SHARE} % of the experts; a wrong label is drawn evenly from the"
        " other tasks. Times are medians with the least and the most, over whole passes; more time"
        " is that beside right labels, in passes that take turns.",
    ),
)
