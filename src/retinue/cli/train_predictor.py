"""`retinue train-predictor`: learns what presets need to know of a model, from texts."""

import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np

from retinue.cli.learnt import Made, as_json, as_text
from retinue.cli.measure import bar, output
from retinue.cli.options import config_from
from retinue.cli.recorded import Recorded, recorded
from retinue.cli.terminal import audience, emit_json, note
from retinue.errors import UsageError
from retinue.model.predictors import (
    default_predictor,
    find_predictor,
    read_predictor,
    write_predictor,
)
from retinue.policy.predict.learned import Learned
from retinue.train.fit import EPOCHS
from retinue.train.parts import Task, baseline, ticks, train_parts
from retinue.train.predictors import train
from retinue.train.texts import divide


def execute(options: Namespace) -> int:
    """Record the texts' routing, learn from it and write the predictor; returns the exit code."""
    config = replace(config_from(options), preset="auto", task=None, profile=None)
    seed = config.seed or 0
    for name, value, least in (("epochs", options.epochs, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UsageError(f"{name} is out of range: `{value}`", hint=f"{least} or more")
    out = output(options.out) if options.out else None
    found = recorded(options, config)
    try:
        made = _learn(found, options.epochs, seed)
    finally:
        if found.measures.whole is not None:
            found.measures.whole.close()
    file = default_predictor(found.folder) if out is None else out
    write_predictor(_merged(found, made, options, file), file)
    texts = len(found.texts)
    print(as_text(made, found.head.routed), file=audience(options.json))
    print(
        f"\nscored on {made.held_out} of {texts} texts, then trained on all;"
        f" {made.train_s:.0f} s; written to {file}",
        file=audience(options.json),
    )
    if options.json:
        about = {"model": options.model, "out": str(file), "kinds": found.kinds, "seed": seed}
        about |= {"epochs": options.epochs or EPOCHS, "texts": texts, "train_s": made.train_s}
        emit_json(about | as_json(made))
    return 0


def _learn(found: Recorded, epochs: int | None, seed: int) -> Made:
    started, training = time.perf_counter(), None
    networks, parts = found.networks, found.parts
    total = 2 * (epochs or EPOCHS) * len(networks) + ticks(parts, epochs)
    with bar(total, "step") as advance:
        if networks:
            training = train(
                found.head,
                found.texts,
                networks,
                epochs=epochs or EPOCHS,
                seed=seed,
                advance=advance,
            )
        task = Task(found.head, found.facts.vocab_size, found.measures, seed, epochs, advance)
        made = train_parts(task, found.examples, parts) if parts else {}
        compared = baseline(task, found.examples) if parts else {}
    held_out = len(divide(found.texts, seed)[1])
    return Made(training, made, compared, held_out, time.perf_counter() - started)


def _merged(found: Recorded, made: Made, options: Namespace, file: Path) -> Learned:
    """What was learnt now, and what the file has already."""
    head = found.head
    shape = (head.layers, head.experts, head.top_k, np.array(head.routed))
    learned = Learned(head.model, *shape, (), len(found.texts), {}, {})
    if made.training is not None:
        learned = made.training.learned
    learned = replace(learned, parts=made.parts)
    try:
        if options.out:
            older = read_predictor(file) if file.is_file() else None
        else:
            older = find_predictor(found.folder, found.facts)
    except UsageError as error:
        note(f"note: what was there is replaced: {error}", "yellow")
        older = None
    return learned if older is None else learned.over(older)
