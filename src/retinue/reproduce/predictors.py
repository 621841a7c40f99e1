"""How well the experts of a prompt are forecast, by who forecasts them."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from retinue.engine.tracing import record, trace_head
from retinue.lab.base import NOTHING_YET, Chart, Column, Row, Series, number
from retinue.policy.predict.forecasters import LEARNED
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.workbench import Workbench
from retinue.train.fit import EPOCHS
from retinue.train.predictors import train
from retinue.train.scores import RESIDENT, Score
from retinue.train.texts import from_trace

NAME = "predictors"
QUICK_EPOCHS = 2
LEAST_TEXTS = 4  # of each task: some to learn from, one that is held out


def run(bench: Workbench) -> list[Row]:
    """One row for each forecaster, over texts that none has learnt from."""
    return bench.once(NAME, "held-out texts", partial(_scores, bench))


def _scores(bench: Workbench) -> list[Row]:
    counted = Counter(text.task for text in bench.texts).values()
    if min(counted) < LEAST_TEXTS:
        bench.say(f"{NAME}: left out, it takes {LEAST_TEXTS} texts of each task")
        return []
    with bench.opened(preset="auto", experts="100%") as llm:
        head = trace_head(llm.assembly, "histogram")
        texts = list(from_trace(head, record(llm.assembly, head, bench.texts, bench.check)))
    epochs = QUICK_EPOCHS if bench.settings.quick else EPOCHS
    made = train(head, texts, LEARNED, epochs=epochs, seed=0, advance=bench.check)
    scores = made.scores["mixed"]
    learnt = len(texts) - made.held_out
    return [
        _row(name, found) | {"texts": made.held_out, "learnt": learnt, "epochs": epochs}
        for name, found in scores.items()
    ]


def _row(name: str, found: Score) -> Row:
    row: Row = {"forecaster": name}
    for key in ("precision", "recall", "f1"):
        values = getattr(found, key)
        row |= {key: float(values.mean())}
        row |= {f"{key}_low": float(values.min()), f"{key}_high": float(values.max())}
    for share, covered in zip(RESIDENT, found.covered, strict=True):
        row[f"covered_{round(100 * share)}"] = covered
    return row


def charts(rows: Sequence[Row]) -> list[Chart]:
    """The three measures side by side, and the routing weight that is covered."""
    if not rows:
        return []
    names = [str(row["forecaster"]).replace("-", "\n") for row in rows]
    bars = [
        Series(key, names, [number(row, key) for row in rows])
        for key in ("precision", "recall", "f1")
    ]
    shares = [100 * share for share in RESIDENT]
    lines = [
        Series(
            str(row["forecaster"]),
            shares,
            [number(row, f"covered_{share:.0f}") for share in shares],
        )
        for row in rows
    ]
    return [
        Chart("Forecast of the experts that are used", "", "mean over layers", bars, kind="bars"),
        Chart("Routing weight covered", "experts in memory, %", "share", lines),
    ]


def verdict(rows: Sequence[Row]) -> str:
    """The best of all, and the best that is the paper's."""
    if not rows:
        return NOTHING_YET
    best = max(rows, key=lambda row: number(row, "f1") or 0.0)
    text = f"{best['forecaster']} has the best F1, {best['f1']:.3f}"
    own = [row for row in rows if row["forecaster"] in LEARNED]
    if own:
        paper = max(own, key=lambda row: number(row, "f1") or 0.0)
        text += f"; of the paper's two, {paper['forecaster']} has {paper['f1']:.3f}"
        text += f" (precision {paper['precision']:.3f}, recall {paper['recall']:.3f})"
    return f"{text}, over {best['texts']} held-out texts."


EXPERIMENT = Experiment(
    name=NAME,
    title="The predictors",
    claim=(
        "A fine-tuned XLNet forecasts with precision, recall and F1 of 0.712, 0.713 and 0.705 on"
        " Mixtral (0.696, 0.689, 0.680 on OpenMoE); eMoE-L and eMoE-A are about equal."
    ),
    columns=(
        Column("forecaster", "forecaster"),
        Column("precision", "precision", ".3f", "precision_low", "precision_high"),
        Column("recall", "recall", ".3f", "recall_low", "recall_high"),
        Column("f1", "F1", ".3f", "f1_low", "f1_high"),
        *[Column(f"covered_{round(100 * s)}", f"covered at {s:.0%}", ".3f") for s in RESIDENT],
        Column("texts", "held out", ".0f"),
        Column("learnt", "learnt from", ".0f"),
        Column("epochs", "epochs", ".0f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=(
        "Means over layers with the least and the most. A small network is trained from scratch"
        " here, on four fifths of the texts; the paper fine-tunes pretrained ones of 0.1 billion"
        " parameters. It does not compare with popularity, means and the prompt's own routing.",
    ),
)
