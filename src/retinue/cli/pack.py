"""`retinue pack`: a self-contained copy of a model in another precision, or a check of one."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from retinue.cli.measure import byte_bar
from retinue.cli.options import config_from, useless
from retinue.cli.terminal import audience, emit_json, fail, note, table
from retinue.config import AS_IS, Config, format_size
from retinue.errors import Cancelled, CheckpointError, UsageError
from retinue.memory.home import locate
from retinue.memory.machine import resident_bytes

DEFAULT = "int4"


def execute(options: Namespace) -> int:
    """Write a pack, or check one; returns the exit code."""
    if options.check:
        return _check(options)
    if options.out is None:
        raise UsageError("where to?", hint="retinue pack MODEL OUT, or --check for a pack")
    config = config_from(options)
    if options.precision == AS_IS:
        raise UsageError("a pack is in another precision", hint="use `--precision int4` or `int8`")
    precision = DEFAULT if config.precision == AS_IS else config.precision
    folder, out = locate(options.model, note), Path(options.out).expanduser()
    started = time.perf_counter()
    summary = _pack(folder, out, precision, config)
    document = {
        "model": options.model,
        "out": str(out),
        "precision": precision,
        **summary,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": resident_bytes(peak=True),
    }
    print(_text(document), file=audience(options.json))
    if options.json:
        emit_json(document)
    return 0


def _pack(folder: Path, out: Path, precision: str, config: Config) -> dict[str, Any]:
    from retinue.engine.packing import pack

    try:
        with byte_bar() as advance:
            return pack(folder, out, precision, config, advance)
    except KeyboardInterrupt as error:
        raise Cancelled("interrupted", hint="the same command goes on from there") from error


def _check(options: Namespace) -> int:
    """Read every byte that a checksum vouches for."""
    from retinue.engine.packing import damaged

    if options.out is not None:
        raise UsageError("--check writes nothing", hint="retinue pack PACK --check")
    useless(options, ("memory", "gpu_memory", "precision", "threads"), "with `--check`")
    config_from(options)
    with byte_bar() as advance:
        wrong, count = damaged(locate(options.model, note), advance)
    if options.json:
        emit_json({"model": options.model, "checked": count, "damaged": [str(e) for e in wrong]})
    for error in wrong:
        fail(str(error))
    if wrong:
        raise CheckpointError(f"{len(wrong)} of {count} parts are damaged", hint=wrong[0].hint)
    print(f"{count} parts, all sound", file=audience(options.json))
    return 0


def _text(document: dict[str, Any]) -> str:
    before, after = document["bytes_before"], document["bytes_after"]
    where = f"expert {document['error_worst_expert']} of layer {document['error_worst_layer']}"
    rows = [
        ("bytes", f"{format_size(before)} to {format_size(after)}", f"{before / after:.2f} x"),
        ("bits a weight", f"{document['bits_per_weight']:.2f}", "all told"),
        ("error of an expert", f"{document['error_mean']:.4f}", "mean, relative L2"),
        ("", f"{document['error_worst']:.4f}", f"worst: {where}"),
        ("error of a dense layer", f"{document['dense_error_mean']:.4f}", "mean"),
        ("time", f"{document['seconds']:.1f} s", "" if document["written"] else "it was there"),
    ]
    return table((document["out"], document["precision"], ""), rows)
