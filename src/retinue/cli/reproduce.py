"""`retinue reproduce`: a paper's evaluation on this model, as a page and as JSON."""

import json
import shlex
import sys
from argparse import Namespace
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

from retinue import __version__
from retinue.cli.interrupts import cancel_on
from retinue.cli.measure import encoder
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json, note
from retinue.config import Config
from retinue.engine.tasks import TaskIds, as_ids, cut_to, read_texts
from retinue.errors import Cancelled, UsageError
from retinue.memory.home import locate, sample_tasks
from retinue.model.predictors import find_predictor
from retinue.model.profiles import find_profile
from retinue.model.survey import fingerprint, survey
from retinue.reproduce.drawing import can_draw
from retinue.reproduce.findings import collect, document, report
from retinue.reproduce.ledger import Ledger
from retinue.reproduce.report import page
from retinue.reproduce.setting import machine, today, versions
from retinue.reproduce.similarity import HOW_TO_GET, can_embed
from retinue.reproduce.studies import Study, study
from retinue.reproduce.workbench import FULL, QUICK, Settings, Workbench
from retinue.types import Facts

PAGE, DOCUMENT = "report.html", "report.json"


def execute(options: Namespace) -> int:
    """Run the experiments that are not done yet, and write the report; returns the exit code."""
    chosen = study(options.name)
    wanted = chosen.chosen(options.only)
    bench = _workbench(options, chosen)
    if options.fresh:
        for experiment in wanted:
            bench.ledger.forget(experiment.name)
    for experiment in wanted:
        bench.ledger.entry(experiment.name)  # refuse now what was measured with another setting
    _say_what_is_missing()
    with cancel_on(bench.stop.set, SIGINT, SIGTERM) as came:
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
    config, texts = _texts(options, config, facts, settings, folder)
    setting = {
        "version": __version__,
        "model": fingerprint(folder),
        "profile": _digest(profile.as_dict()),
        "predictor": "none" if predictor is None else f"of {predictor.texts} texts",
        "texts": _digest([[each.task, each.ids, each.scored] for each in texts]),
        "precision": config.precision,
        "amount": "quick" if options.quick else "full",
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


def _digest(content: Any) -> str:
    """A short name for what is JSON-shaped."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _texts(
    options: Namespace, config: Config, facts: Facts, settings: Settings, folder: Path
) -> tuple[Config, list[TaskIds]]:
    """The texts as ids, and a configuration with a context for them and for answers."""
    data = Path(options.data) if options.data else sample_tasks()
    texts = read_texts(data, settings.texts_per_task)
    ids = as_ids(texts, encoder(folder, texts), facts.vocab_size)
    if config.context is None:
        longest = max(len(text.ids) for text in ids) + settings.answer_tokens
        config = replace(config, context=min(longest, facts.max_context, config.chunk))
    room = min(config.context or facts.max_context, config.chunk) - settings.answer_tokens
    if room < 2:
        raise UsageError(
            f"a context of {config.context} has no room for answers of {settings.answer_tokens}"
            " tokens",
            hint="use a larger `--context`",
        )
    ids = cut_to(ids, room)
    if cut := sum(text.cut for text in ids):
        note(f"note: {cut} of {len(ids)} texts are cut from the left to {room} tokens", "yellow")
    return config, ids


def _out(options: Namespace, chosen: Study) -> Path:
    return Path(options.out or f"retinue-{chosen.name}")


def _write(options: Namespace, chosen: Study, bench: Workbench) -> tuple[Path, dict[str, Any]]:
    """Write the page and the JSON of all that the ledger has; returns the page's place."""
    findings = collect(chosen, bench.ledger)
    setting = _setting(options, bench)
    out, written = _out(options, chosen), document(chosen, setting, findings)
    text = page(report(chosen, setting, findings))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / DOCUMENT).write_text(
            json.dumps(written, ensure_ascii=False, indent=1), encoding="utf-8"
        )
        (out / PAGE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to `{out}`: {error}") from error
    return out / PAGE, written


def _setting(options: Namespace, bench: Workbench) -> dict[str, Any]:
    facts, texts = bench.facts, bench.texts
    tasks = len({text.task for text in texts})
    shape = f"{facts.moe_layers} layers of {facts.experts_per_layer} experts, top {facts.top_k}"
    scored = sum(text.scored for text in texts)
    data = Path(options.data).name if options.data else sample_tasks().name
    return {
        "model": f"{options.model} ({facts.family}, {shape})",
        "texts": f"{len(texts)} of {tasks} tasks from {data}, {scored} scored tokens",
        "answers": f"{len(bench.asked)}, greedy, at most {bench.settings.answer_tokens} tokens",
        "precision": bench.config.precision,
        "machine": machine(),
        "versions": versions(),
        "date": today(),
        "command": shlex.join(["retinue", *sys.argv[1:]]),
    }
