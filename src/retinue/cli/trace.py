"""`retinue trace`: which experts every token of the texts chose, in one file."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from retinue.cli.measure import bar, measured, output
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json
from retinue.config import format_size
from retinue.engine.tracing import record, trace_head
from retinue.errors import UsageError
from retinue.trace import SIGNALS, Trace, TraceWriter, append, check_same_model


def execute(options: Namespace) -> int:
    """Run the texts through the plain model and write their routing; returns the exit code."""
    config = replace(config_from(options), preset="auto", task=None, profile=None)
    earlier = Trace(Path(options.merge)) if options.merge else None
    out = output(options.out)
    signals = _signals(options)
    with measured(options, config) as (assembly, texts):
        head = trace_head(assembly, options.detail, signals, config.precision)
        if earlier is not None:
            check_same_model(head, earlier.head, earlier.file)
        with TraceWriter(out, head) as writer:
            append(writer, earlier.requests(signals) if earlier is not None else ())
            with bar(len(texts)) as advance:
                append(writer, record(assembly, head, texts, advance))
    size = out.stat().st_size
    document = {
        "model": options.model,
        "out": str(out),
        "detail": head.detail,
        "signals": list(head.signals),
        "requests": writer.requests,
        "tokens": writer.tokens,
        "bytes": size,
        "bytes_per_token": size / writer.tokens,
    }
    print(
        f"{writer.requests} requests, {writer.tokens} tokens, {format_size(size)}"
        f" ({size / writer.tokens:.0f} bytes a token)\n\nwritten to {out}",
        file=audience(options.json),
    )
    if options.json:
        emit_json(document)
    return 0


def _signals(options: Namespace) -> tuple[str, ...]:
    """The names in `--signals`, in the order of `SIGNALS`. Raises UsageError for others."""
    names = [name.strip() for name in options.signals.split(",")] if options.signals else []
    if unknown := [name for name in names if name not in SIGNALS]:
        raise UsageError(f"unknown signal: `{unknown[0]}`", hint=f"known: {', '.join(SIGNALS)}")
    return tuple(name for name in SIGNALS if name in names)
