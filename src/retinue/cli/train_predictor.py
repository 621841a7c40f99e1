"""`retinue train-predictor`: learns which experts the next prompts will use, from texts."""

import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from retinue.cli.measure import bar, measured
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json, note, table
from retinue.config import Config
from retinue.engine.tracing import record, trace_head
from retinue.errors import UsageError
from retinue.memory.home import locate
from retinue.model.predictors import default_predictor, write_predictor
from retinue.model.survey import survey
from retinue.trace import Trace, TraceHead
from retinue.train.fit import EPOCHS
from retinue.train.predictors import Training, train
from retinue.train.scores import RESIDENT, Score
from retinue.train.texts import RoutedText, from_trace

RUNNING = ("memory", "experts", "context", "precision", "threads", "self_check")


def execute(options: Namespace) -> int:
    """Record the texts' routing, train on it and write the predictor; returns the exit code."""
    epochs = EPOCHS if options.epochs is None else options.epochs
    config = replace(config_from(options), preset="auto", task=None, profile=None)
    seed = config.seed or 0
    for name, value, least in (("epochs", epochs, 1), ("seed", seed, 0)):
        if value < least:
            raise UsageError(f"{name} is out of range: `{value}`", hint=f"{least} or more")
    kinds = ("emoe-a", "emoe-l") if options.kind == "all" else (options.kind,)
    folder, head, texts = _traced(options, config) if options.trace else _run(options, config)
    started = time.perf_counter()
    with bar(2 * epochs * len(kinds), "epoch") as advance:
        made = train(head, texts, kinds, epochs=epochs, seed=seed, advance=advance)
    train_s = time.perf_counter() - started
    file = Path(options.out) if options.out else default_predictor(folder)
    write_predictor(made.learned, file)
    print(_text(made, file, train_s), file=audience(options.json))
    if options.json:
        emit_json(
            {
                "model": options.model,
                "out": str(file),
                "kinds": list(kinds),
                "epochs": epochs,
                "seed": seed,
                "train_s": train_s,
                "texts": len(texts),
                "held_out": made.held_out,
                "scores": {
                    order: {name: _as_dict(found) for name, found in scores.items()}
                    for order, scores in made.scores.items()
                },
            }
        )
    return 0


def _run(options: Namespace, config: Config) -> tuple[Path, TraceHead, list[RoutedText]]:
    """The checkpoint's folder, and how it routes the texts; it is closed again."""
    with measured(options, config) as (assembly, ids), bar(len(ids)) as advance:
        head = trace_head(assembly, "histogram")
        return assembly.folder, head, list(from_trace(head, record(assembly, head, ids, advance)))


def _traced(options: Namespace, config: Config) -> tuple[Path, TraceHead, list[RoutedText]]:
    """The same from a trace of the model. Raises UsageError for another model's."""
    for name in ("data", "per_task", *RUNNING):
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"`{flag}` is of no use with `--trace`, which runs no texts",
                hint="leave one of both out",
            )
    trace, folder = Trace(Path(options.trace)), locate(options.model, note)
    facts, head = survey(folder, config.precision), trace.head
    if (head.layers, head.experts, head.top_k) != (
        facts.layers,
        facts.experts_per_layer,
        facts.top_k,
    ):
        raise UsageError(
            f"the trace `{trace.file}` is of another model: `{head.model}`",
            hint="record one of this model with `retinue trace`",
        )
    return folder, head, list(from_trace(head, trace))


def _as_dict(found: Score) -> dict[str, Any]:
    by_layer = {key: getattr(found, key).tolist() for key in ("precision", "recall", "f1")}
    covered = {f"{share:.0%}": value for share, value in zip(RESIDENT, found.covered, strict=True)}
    return by_layer | {"covered": covered}


def _text(made: Training, file: Path, train_s: float) -> str:
    parts = [_overview(order, scores) for order, scores in made.scores.items()]
    names = list(made.scores["mixed"])
    rows = [
        (layer, *(f"{made.scores['mixed'][name].f1[at]:.3f}" for name in names))
        for at, layer in enumerate(made.learned.rows.tolist())
    ]
    parts.append(f"F1 by layer, tasks mixed\n{table(('layer', *names), rows)}")
    parts.append(
        f"scored on {made.held_out} of {made.learned.texts} texts, then trained on all;"
        f" {train_s:.0f} s; written to {file}"
    )
    return "\n\n".join(parts)


def _overview(order: str, scores: dict[str, Score]) -> str:
    shares = [f"{share:.0%}" for share in RESIDENT]
    rows = []
    for name, found in scores.items():
        means = (found.precision.mean(), found.recall.mean(), found.f1.mean())
        rows.append((name, *(f"{value:.3f}" for value in (*means, *found.covered))))
    what = "tasks mixed" if order == "mixed" else "one task after the other"
    head = ("forecaster", "precision", "recall", "F1", *shares)
    return f"held-out texts, {what}; routing weight covered by so many experts\n{table(head, rows)}"
