"""`retinue reproduce`: a paper's evaluation on this model, as a page and as JSON."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

from retinue import __version__
from retinue.cli.interrupts import cancel_on
from retinue.cli.laboratory import (
    described,
    digest,
    digest_of_texts,
    said_once,
    texts_for,
    unusual,
    write_files,
)
from retinue.cli.measure import output
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json, note
from retinue.errors import Cancelled
from retinue.lab.drawing import HOW_TO_GET, can_draw
from retinue.lab.ledger import Ledger
from retinue.lab.page import page
from retinue.memory.home import locate
from retinue.model.predictors import find_predictor
from retinue.model.profiles import find_profile
from retinue.model.survey import fingerprint, survey
from retinue.reproduce.findings import collect, document, report
from retinue.reproduce.similarity import can_embed
from retinue.reproduce.studies import Study, study
from retinue.reproduce.workbench import FULL, QUICK, Workbench

PAGE, DOCUMENT = "report.html", "report.json"


def execute(options: Namespace) -> int:
    """Run the experiments that are not done yet, and write the report; returns the exit code."""
    chosen = study(options.name)
    wanted = chosen.chosen(options.only)
    bench = _workbench(options, chosen)
    if options.fresh:
        for experiment in wanted:
            bench.ledger.forget(experiment.name)
    for experiment in chosen.experiments:
        # The page shows what is in the folder: refuse now what was measured with another setting.
        bench.ledger.entry(experiment.name)
    _say_what_is_missing()
    with said_once(), cancel_on(bench.interrupt, SIGINT, SIGTERM) as came:
        try:
            for experiment in wanted:
                experiment.measure(bench)
        except Cancelled as error:
            file, _ = _write(options, chosen, bench)
            raise Cancelled(
                f"stopped by {Signals(came[0]).name}; what was measured is in `{file}`",
                hint="the same command goes on from there",
            ) from error
    file, written = _write(options, chosen, bench)
    for name, found in written["experiments"].items():
        print(f"{name}: {found['verdict']}\n", file=audience(options.json))
    print(f"written to {file}", file=audience(options.json))
    if options.json:
        emit_json(written)
    return 0


def _say_what_is_missing() -> None:
    for what, here in (("similarity of answers", can_embed()), ("plots", can_draw())):
        if not here:
            note(f"note: without {what}; to have it: {HOW_TO_GET}", "yellow")


def _workbench(options: Namespace, chosen: Study) -> Workbench:
    """The model's facts, the texts as ids, and the ledger; nothing is loaded."""
    settings = QUICK if options.quick else FULL
    if options.per_task is not None:
        answers = min(settings.answers_per_task, options.per_task)
        settings = replace(settings, texts_per_task=options.per_task, answers_per_task=answers)
    config, folder = config_from(options), locate(options.model, note)
    facts = survey(folder, config.precision)
    profile = find_profile(folder, facts, config.profile)  # refuse now where there is none
    predictor = find_predictor(folder, facts)
    amounts = {"per_task": settings.texts_per_task, "answer": settings.answer_tokens}
    config, texts = texts_for(options, config, facts, folder, **amounts)
    setting = {
        "version": __version__,
        "model": fingerprint(folder),
        "profile": digest(profile.as_dict()),
        "predictor": "none" if predictor is None else f"of {predictor.texts} texts",
        "texts": digest_of_texts(texts),
        "precision": config.precision,
        "amount": "quick" if options.quick else "full",
        **unusual(config, ("memory", "threads")),
    }
    return Workbench(
        model=options.model,
        folder=folder,
        facts=facts,
        config=config,
        texts=texts,
        settings=settings,
        ledger=Ledger(_out(options, chosen), setting),
        say=note,
    )


def _out(options: Namespace, chosen: Study) -> Path:
    return output(options.out or f"retinue-{chosen.name}", folder=True)


def _write(options: Namespace, chosen: Study, bench: Workbench) -> tuple[Path, dict[str, Any]]:
    """Write the page and the JSON of all that the ledger has; returns the page's place."""
    findings = collect(chosen, bench.ledger)
    setting = _setting(options, bench)
    out, written = _out(options, chosen), document(chosen, setting, findings)
    files = {DOCUMENT: json.dumps(written, ensure_ascii=False, indent=1)}
    write_files(out, files | {PAGE: page(report(chosen, setting, findings))})
    return out / PAGE, written


def _setting(options: Namespace, bench: Workbench) -> dict[str, Any]:
    longest = bench.settings.answer_tokens
    return described(
        options,
        bench.facts,
        bench.texts,
        answers=f"{len(bench.asked)}, greedy, at most {longest} tokens",
        precision=bench.config.precision,
    )
