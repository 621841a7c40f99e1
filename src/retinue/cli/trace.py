"""`retinue trace`: which experts every token of the texts chose, in one file."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from retinue.cli.measure import bar, measured
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json
from retinue.config import format_size
from retinue.engine.tracing import record, trace_head
from retinue.trace import Trace, TraceWriter, append, check_same_model


def execute(options: Namespace) -> int:
    """Run the texts through the plain model and write their routing; returns the exit code."""
    config = replace(config_from(options), preset="auto", task=None, profile=None)
    earlier = Trace(Path(options.merge)) if options.merge else None
    out = Path(options.out)
    with measured(options, config) as (assembly, texts):
        head = trace_head(assembly, options.detail)
        if earlier is not None:
            check_same_model(head, earlier.head, earlier.file)
        with TraceWriter(out, head) as writer:
            append(writer, earlier or ())
            with bar(len(texts)) as advance:
                append(writer, record(assembly, head, texts, advance))
    size = out.stat().st_size
    document = {
        "model": options.model,
        "out": str(out),
        "detail": head.detail,
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
