"""`retinue simulate`: a trace replayed through presets, without the model."""

import random
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from retinue.cli.compared import COMPARE, Compared
from retinue.cli.options import config_from, useless
from retinue.cli.simulated import Known, Machine, advice_text, cell_text, left_out_text
from retinue.cli.terminal import audience, bar, emit_json, note
from retinue.compare.grid import BASE
from retinue.config import Config, parse_size
from retinue.errors import Refused, UsageError
from retinue.memory.budget import split
from retinue.policy.presets import PRESETS
from retinue.policy.recommended import Recommendation, joined
from retinue.sim.candidates import RECORDED, Candidate, candidates, chosen
from retinue.sim.cells import ORACLE, Filled, Table
from retinue.sim.passes import Load
from retinue.sim.recommend import DEFAULT, LEAST_RUNS, advise
from retinue.sim.recorded import Recording
from retinue.sim.stage import Setting
from retinue.trace import Trace, TraceHead
from retinue.types import Facts


def execute(options: Namespace) -> int:
    """Replay the trace through presets in every cell; returns the exit code."""
    config = config_from(options)
    if not options.recommend:
        useless(options, ("allow_approximate",), "without `--recommend`")
    trace = Trace(Path(options.trace))
    known = Known(trace.head, options.model, config)
    machine: Machine | Compared
    if options.compared is not None:
        machine = Compared(trace, known, options)
    else:
        machine = Machine(trace, known, options, config)
    load = _load(trace, options, config)
    cells = machine.cells(_rooms(trace.head, machine.facts, options, config), load)
    wanted = chosen(options.presets)
    beside = (ORACLE, DEFAULT) if options.recommend else (ORACLE,)
    wanted += [PRESETS[name] for name in beside if name not in [row.name for row in wanted]]
    able, left_out = candidates(wanted, trace.head, known.of, timed=bool(load.arrivals))
    _check_named(options, left_out)
    allowed = [_allowed(options, able, cell.setting) for cell in cells if options.recommend]
    if not trace.tokens:
        raise UsageError(f"the trace `{trace.file}` has no tokens", hint="record some texts")
    recording = Recording(trace, sorted(frozenset().union(*(each.needs for each in able))))
    source = cells[0].setting.times.source
    note(f"times are from {source}; {len(trace)} requests, {trace.tokens} tokens")
    for each in able:
        for text in each.notes:
            if text != RECORDED:  # which goes for all approximate ones
                note(f"{each.preset.name} {text}", "yellow")
    table = Table(recording, able, machine.read_bytes)
    with bar(len(cells) * len(able), "replay") as advance:
        filled = [table.fill(cell, advance) for cell in cells]
    texts = [cell_text(each) for each in filled]
    if left_out:
        texts.append(left_out_text(left_out))
    print("\n\n".join(texts), file=audience(options.json))
    document = _document(trace, machine, filled, left_out)
    if options.recommend:
        document["recommended"] = _recommend(options, known, table, allowed, filled, machine)
    if options.json:
        emit_json(document)
    return 0


def _check_named(options: Namespace, left_out: dict[str, str]) -> None:
    """Raise Refused where not one of the presets that were named can be replayed."""
    if options.presets and {preset.name for preset in chosen(options.presets)} <= left_out.keys():
        raise Refused(
            f"no preset of `{options.presets}` can be replayed: "
            + "; ".join(f"`{name}` {why}" for name, why in left_out.items()),
            hint="leave `--presets` out for those that can",
        )


def _load(trace: Trace, options: Namespace, config: Config) -> Load:
    """How requests come: all at once, or by chance at a rate."""
    arrivals: tuple[float, ...] = ()
    if options.rate is not None:
        if not options.rate > 0:
            raise UsageError(f"rate is out of range: `{options.rate}`", hint="above 0")
        draw, now, times = random.Random(config.seed or 0), 0.0, []
        for _ in range(len(trace)):
            now += draw.expovariate(options.rate)
            times.append(now)
        arrivals = tuple(times)
    return Load(config.batch or 1, config.chunk, arrivals)


def _rooms(
    head: TraceHead, facts: Facts, options: Namespace, config: Config
) -> list[tuple[str, int]]:
    """How many experts fit, for every room that is asked for, each with what it is called."""
    given = config.experts
    if options.memory is not None or given is None:
        shares = str(given).split(",") if given is not None else [None]
        room = config.room()
        found = [split(facts, **room | {"experts": share and share.strip()}) for share in shares]
        labels = [share.strip() if share else str(config.memory) for share in shares]
        return [(label, each.slots) for label, each in zip(labels, found, strict=True)]
    useless(options, ("context",), "where `--experts` alone says what fits")
    rooms = []
    for share in str(given).split(","):
        size = parse_size(share.strip(), whole=facts.total_experts * facts.slot_bytes)
        slots = min(size // facts.slot_bytes, facts.total_experts)
        if slots < head.top_k:
            raise UsageError(
                f"`--experts {share.strip()}` leaves room for {slots} experts; one token needs"
                f" {head.top_k} at once",
                hint=f"use `--experts {head.top_k * facts.slot_bytes}` or more",
            )
        rooms.append((share.strip(), slots))
    return rooms


def _document(
    trace: Trace, machine: Machine | Compared, filled: list[Filled], left_out: dict[str, str]
) -> dict[str, Any]:
    head, first, setting = trace.head, filled[0].as_dict(), filled[0].cell.setting
    document = {
        "trace": str(trace.file),
        "model": head.model,
        "precision": head.precision,
        "requests": len(trace),
        "tokens": trace.tokens,
        "read_bytes": machine.read_bytes,
        "latency_s": setting.roads.latency_s,
        "times": asdict(setting.times),
        "left_out": left_out,
        **first,
    }
    return document | ({"cells": [each.as_dict() for each in filled]} if len(filled) > 1 else {})


def _recommend(
    options: Namespace,
    known: Known,
    table: Table,
    allowed: list[list[Candidate]],
    filled: list[Filled],
    machine: Machine | Compared,
) -> list[dict[str, Any]]:
    """Find the best preset for each cell; what is sure and exact goes into the profile."""
    rows, entries = [], tuple[Recommendation, ...]()
    for each, able in zip(filled, allowed, strict=True):
        evidence, cell = machine.evidence(each.cell), each.cell
        advice = advise(table, able, cell, evidence)
        print(f"\n{advice_text(each, advice)}", file=audience(options.json))
        here = options.disk is None and not cell.setting.roads.in_turn
        entry = known.entry(cell, advice, here=here)
        entries += (entry,) if len(evidence.runs) >= LEAST_RUNS else ()
        rows.append(asdict(entry) | {"experts": cell.label, "why_not": list(advice.why_not)})
    if entries:
        _remember(known, entries)
    else:
        note(f"nothing is kept; hint: {COMPARE}", "yellow")
    return rows


def _allowed(options: Namespace, able: list[Candidate], setting: Setting) -> list[Candidate]:
    """Who may be recommended: where others' costs were measured, those whose own were as well."""
    allowed = [each for each in able if each.preset.exact or options.allow_approximate]
    if setting.own:
        allowed = [each for each in allowed if each.preset.name in (BASE, *setting.own)]
    if DEFAULT not in [each.preset.name for each in allowed]:
        raise UsageError(
            f"`{DEFAULT}` cannot be replayed, so nothing can be recommended in its place",
            hint="record the trace with `--signals scores,next_scores`",
        )
    return allowed


def _remember(known: Known, entries: tuple[Recommendation, ...]) -> None:
    """Keep what may serve `--preset auto`, if there is a profile to keep it in."""
    exact = tuple(
        entry for entry in entries if entry.preset in PRESETS and PRESETS[entry.preset].exact
    )
    profile, file = known.profile(), known.profile_file()
    if profile is None or file is None:
        note("there is no profile to keep this in; hint: `retinue profile MODEL --data FILE`")
        return
    from retinue.model.profiles import write_profile

    write_profile(replace(profile, recommended=joined(profile.recommended, exact)), file)
    note(f"written to {file}: `--preset auto` goes by it")
