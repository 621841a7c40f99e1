"""`retinue compare`: presets side by side on this model, live, as a page, Markdown and JSON."""

import json
from argparse import Namespace
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

from retinue import __version__
from retinue.cli.interrupts import cancel_on
from retinue.cli.laboratory import (
    described,
    digest_of_texts,
    said_once,
    texts_for,
    unusual,
    write_files,
)
from retinue.cli.measure import output
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json, note, table
from retinue.compare import foresight, live
from retinue.compare.document import ENTRIES, document
from retinue.compare.grid import Grid, budgets, disks, grid, words
from retinue.compare.page import report
from retinue.compare.quality import Quality
from retinue.compare.replayed import Replays
from retinue.config import Config, format_size
from retinue.errors import Cancelled
from retinue.lab.base import Row
from retinue.lab.bench import Bench
from retinue.lab.drawing import HOW_TO_GET, can_draw
from retinue.lab.ledger import Ledger
from retinue.lab.markdown import markdown
from retinue.lab.page import page
from retinue.memory.home import locate
from retinue.model.survey import fingerprint, survey

SHARES = "12.5%,25%,50%"
PER_TASK = 1


def execute(options: Namespace) -> int:
    """Measure what is not measured yet, and write the report; returns the exit code."""
    config = config_from(options)
    cells = _grid(options, config)
    bench = _bench(options, config, cells)
    for name in ENTRIES:
        if options.fresh:
            bench.ledger.forget(name)
        bench.ledger.entry(name)  # refuse now what was measured with another setting
    trace = _out(options) / "texts.trace"
    if options.fresh:
        trace.unlink(missing_ok=True)
    if not can_draw():
        note(f"note: without plots; to have them: {HOW_TO_GET}", "yellow")
    with said_once(), cancel_on(bench.interrupt, SIGINT, SIGTERM) as came:
        try:
            runs = live.measure(bench, cells)
            Quality(bench, cells).measure()
            foresight.measure(bench, cells)
            Replays(bench, cells, trace).measure(runs)
        except Cancelled as error:
            _write(options, cells, bench)
            raise Cancelled(
                f"stopped by {Signals(came[0]).name}; what was measured is in `{_out(options)}`",
                hint="the same command goes on from there",
            ) from error
    written = _write(options, cells, bench)
    print(_text(written), file=audience(options.json))
    print(f"\nwritten to {_out(options) / 'compare.html'}", file=audience(options.json))
    if options.json:
        emit_json(written)
    return 0


def _grid(options: Namespace, config: Config) -> Grid:
    sizes = words(options.sizes) if options.sizes else [str(config.memory)]
    shares: list[str | None] = [None]
    if options.shares:
        shares = list(words(options.shares))
    elif config.experts is not None:
        shares = [str(config.experts)]
    elif len(sizes) == 1:
        shares = list(words(SHARES))
    places = budgets(sizes, shares), disks(options.read_limits)
    return grid(options.presets, *places, options.runs, options.new_tokens)


def _bench(options: Namespace, config: Config, cells: Grid) -> Bench:
    """The model's facts, the texts as ids, and the ledger; nothing is loaded."""
    folder = locate(options.model, note)
    facts = survey(folder, config.precision)
    amounts = {"per_task": options.per_task or PER_TASK, "answer": 1}
    config, texts = texts_for(options, config, facts, folder, **amounts)
    setting = {
        "version": __version__,
        "model": fingerprint(folder),
        "texts": digest_of_texts(texts),
        "precision": config.precision,
        "threads": config.threads,
        "new_tokens": cells.new_tokens,
        **unusual(config, ("chunk", "eager", "profile")),
    }
    return Bench(
        model=options.model,
        folder=folder,
        facts=facts,
        config=config,
        texts=texts,
        ledger=Ledger(_out(options), setting),
        say=note,
    )


def _out(options: Namespace) -> Path:
    return output(options.out or "retinue-compare", folder=True)


def _write(options: Namespace, cells: Grid, bench: Bench) -> dict[str, Any]:
    """Write the page, the Markdown and the JSON of all that the ledger has; returns the last."""
    setting = described(options, bench.facts, bench.texts, precision=bench.config.precision)
    written = document(options.model, cells, setting, bench.ledger)
    shown = report(cells, written)
    files = {"compare.json": json.dumps(written, ensure_ascii=False, indent=1)}
    files |= {"compare.md": markdown(shown), "compare.html": page(shown)}
    write_files(_out(options), files)
    return written


def _text(written: dict[str, Any]) -> str:
    """The cells, as a table for a terminal."""
    header = ("preset", "experts", "disk", "decode", "prefill", "read a token", "hits", "verdict")
    return table(header, [_line(row) for row in written["cells"]])


def _line(row: Row) -> tuple[str, ...]:
    return (
        str(row["preset"]),
        str(row["experts"] or row["memory"]),
        str(row["read_limit"] or "as it is"),
        f"{row['decode_tokens_per_s']:.1f}",
        f"{row['prefill_tokens_per_s']:.0f}",
        format_size(float(row["bytes_read_per_token"] or 0)),
        f"{row['hit_rate']:.1%}",
        str(row.get("decode_verdict") or ""),
    )
