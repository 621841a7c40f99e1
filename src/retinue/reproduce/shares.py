"""How many experts are in memory, against loss, agreement and meaning of the answers."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from retinue.engine.evaluate import Evaluation, evaluate
from retinue.engine.llm import LLM
from retinue.lab.base import NOTHING_YET, Chart, Column, Row, Value, lines_by, number
from retinue.lab.spread import mean
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.similarity import similarities
from retinue.reproduce.workbench import Answer, Workbench

NAME = "shares"
PERIOD = 40  # prompts between two forecasts, the paper's


@dataclass(frozen=True, slots=True)
class Method:
    """A line of the plots: a preset with some settings of `Config`."""

    label: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False


METHODS = (
    Method("eMoE-A", "emoe", {"forecaster": "emoe-a", "period": PERIOD}),
    Method("eMoE-L", "emoe", {"forecaster": "emoe-l", "period": PERIOD}),
    Method("eMoE-E", "emoe", {"forecaster": "emoe-a", "period": 1}),
    Method("emoe, running mean", "emoe"),
    Method("emoe-fetch", "emoe-fetch"),
    Method("random set", "random"),
    Method("popularity", "popular"),
    Method("popularity by task", "popular-by-task"),
    Method("on demand", "on-demand", exact=True),
    Method("look-ahead", "auto", exact=True),
)
COMPARED = ("eMoE-A", "popularity by task", "random set")  # beside the best


def run(bench: Workbench) -> list[Row]:
    """One row for each method and share; the plain model is the row with all experts."""
    rows = bench.once(NAME, "plain, 100 %", partial(_plain, bench))
    for share in bench.settings.shares:
        for method in METHODS:
            rows = rows + bench.once(
                NAME, f"{method.label}, {share} %", partial(_cell, bench, method, share)
            )
    return rows


def _plain(bench: Workbench) -> list[Row]:
    tokens = sum(len(scored.nll) for scored in bench.plain)
    loss = sum(float(scored.nll.sum()) for scored in bench.plain) / tokens
    row: Row = {"method": "all resident", "share": 100, "nll": loss, "added": 0.0}
    row |= {"added_low": 0.0, "added_high": 0.0, "agreement": 1.0, "tokens": tokens}
    row |= {"tasks": len({text.task for text in bench.texts}), "bytes_read": 0, "exact": True}
    return [row | _speed(bench.plain_answers)]


def _cell(bench: Workbench, method: Method, share: int) -> list[Row]:
    plain, answers = bench.plain, bench.plain_answers  # before this model is opened
    row: Row = {"method": method.label, "share": share, "exact": method.exact}
    with bench.opened(preset=method.preset, experts=f"{share}%", **method.settings) as llm:
        row |= _quality(evaluate(llm.assembly, bench.texts, bench.check, plain))
        row |= _residency(llm)
        ours = bench.answers(llm)
    return [row | _speed(ours) | _meaning(bench, ours, answers)]


def _quality(result: Evaluation) -> dict[str, Value]:
    scores = list(result.tasks.values())
    weights = [score.tokens for score in scores]
    added = mean([score.nll - score.nll_plain for score in scores], weights)
    agreement = mean([score.agreement for score in scores], weights)
    return {
        "nll": result.total.nll,
        "added": added.value,
        "added_low": added.low,
        "added_high": added.high,
        "agreement": agreement.value,
        "agreement_low": agreement.low,
        "agreement_high": agreement.high,
        "tasks": len(scores),
        "tokens": result.total.tokens,
        "degraded_share": result.degraded_share,
        "misses": result.misses,
        "fetched": result.fetched,
        "bytes_read": result.bytes_read,
    }


def _residency(llm: LLM) -> dict[str, Value]:
    split = llm.assembly.split
    return {"resident": split.slots, "expert_bytes": split.experts}


def _speed(answers: Sequence[Answer]) -> dict[str, Value]:
    seconds = [answer.seconds for answer in answers]
    rates = [answer.tokens / answer.seconds for answer in answers if answer.seconds]
    return {
        "answers": len(answers),
        "answer_s": statistics.median(seconds),
        "answer_tokens_per_s": statistics.median(rates),
    }


def _meaning(bench: Workbench, ours: Sequence[Answer], plain: Sequence[Answer]) -> dict[str, Value]:
    texts = [answer.text for answer in plain]
    if not any(texts) or bench.embed is None:
        return {}
    found = mean(similarities(bench.embed, [answer.text for answer in ours], texts))
    return {
        "similarity": found.value,
        "similarity_low": found.low,
        "similarity_high": found.high,
    }


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Loss, agreement and meaning over the share; exact methods would all lie on the plain one."""
    lossy = [row for row in rows if not row["exact"]]
    x = "experts in memory, %"
    plans = (
        ("Loss added by missing experts", "nats a token over the plain model", "added", 0.0),
        ("Same next token as the plain model", "share of positions", "agreement", 1.0),
        ("Meaning of the answers", "cosine to the plain model's answer", "similarity", 1.0),
    )
    found = []
    for title, y, key, reference in plans:
        lines = lines_by(lossy, "method", "share", key, (f"{key}_low", f"{key}_high"))
        if lines:
            chart = Chart(title, x, y, lines, reference=reference, reference_label="all resident")
            found.append(chart)
    times = lines_by(rows, "method", "share", "answer_s")
    found += [Chart("Time of an answer", x, "seconds, median", times)] if times else []
    return found


def verdict(rows: Sequence[Row]) -> str:
    """What the methods add at each share, from a forecast set to one drawn by chance."""
    lossy = [row for row in rows if not row["exact"]]
    shares = list(dict.fromkeys(row["share"] for row in lossy))
    known: dict[str, dict[Value, Row]] = {}
    for row in lossy:
        known.setdefault(str(row["method"]), {})[row["share"]] = row
    reading = [name for name, mine in known.items() if any(row["fetched"] for row in mine.values())]
    still = sorted((name for name in known if name not in reading), key=lambda at: _mean(known[at]))
    if not still:
        return NOTHING_YET
    percent = ", ".join(str(share) for share in shares)
    chosen = [name for name in still if name in (still[0], *COMPARED)]
    parts = [_told(name, known[name], shares) for name in chosen]
    text = (
        f"Loss added, in nats a token, with {percent} % of the experts and nothing fetched:"
        f" {'; '.join(parts)}."
    )
    on_demand = {row["share"]: row for row in rows if row["method"] == "on demand"}
    for name in reading:
        fewer = _fewer(known[name], on_demand, shares)
        text += f" With misses fetched: {_told(name, known[name], shares)}{fewer}."
    return text


def _told(name: str, mine: Mapping[Value, Row], shares: Sequence[Value]) -> str:
    """One method's losses, share by share."""
    told = [f"{mine[share]['added']:+.3f}" if share in mine else "not run" for share in shares]
    return f"{name} {', '.join(told)}"


def _fewer(
    mine: Mapping[Value, Row], on_demand: Mapping[Value, Row], shares: Sequence[Value]
) -> str:
    """How many times fewer bytes a method reads than on demand."""
    told = []
    for share in shares:
        read = number(mine.get(share, {}), "bytes_read")
        whole = number(on_demand.get(share, {}), "bytes_read")
        if read and whole:
            told.append(f"{whole / read:.1f}")
    return f", reading {', '.join(told)} times fewer bytes than on demand" if told else ""


def _mean(mine: Mapping[Value, Row]) -> float:
    return statistics.mean(number(row, "added") or 0.0 for row in mine.values())


EXPERIMENT = Experiment(
    name=NAME,
    title="Share of the experts in memory",
    claim=(
        "With 20 to 80 % less memory the answers keep a similarity of 93.7 to 99.8 % to those of"
        " the whole model (60 % of the experts: 98.2 to 98.8 %; 80 %: 99.6 to 99.7 %); a random"
        " set is 4.1 to 8.6 points lower. The time of an answer is about that of all experts"
        " resident; loading on demand takes 3.2 to 5 times as long."
    ),
    columns=(
        Column("method", "method"),
        Column("share", "experts, %", ".0f"),
        Column("added", "loss added", "+.3f", "added_low", "added_high"),
        Column("agreement", "agreement", ".3f", "agreement_low", "agreement_high"),
        Column("similarity", "similarity", ".3f", "similarity_low", "similarity_high"),
        Column("degraded_share", "degraded", ".1%"),
        Column("bytes_read", "read", "bytes"),
        Column("answer_s", "answer, s", ".2f"),
        Column("tokens", "tokens", ".0f"),
        Column("answers", "answers", ".0f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=(
        "Loss and agreement are teacher-forced on the texts' continuations, which the paper does"
        " not report; similarity is of greedy answers, as in the paper, by a smaller sentence"
        " model. Intervals hold 90 % of bootstrap draws, over tasks for loss and agreement, over"
        " answers for similarity.",
        f"eMoE-A and -L forecast every {PERIOD} prompts, as in the paper, eMoE-E before each one;"
        " with fewer texts the first forecast serves them all. Bytes read are counted as if every"
        " token had been decoded by itself.",
    ),
)
