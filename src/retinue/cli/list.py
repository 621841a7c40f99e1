"""`retinue list`: what is in the hub's cache, and what retinue keeps for itself."""

import time
from argparse import Namespace
from dataclasses import asdict

from retinue.cli.terminal import emit_json, note, table
from retinue.config import format_size
from retinue.memory.hub_cache import Cached, cache_root, cached, used_bytes
from retinue.memory.machine import cache_folder

OWN = "cache"  # what `retinue rm` calls retinue's own


def execute(options: Namespace) -> int:
    """Print what is there; returns the exit code."""
    models, own = cached(), used_bytes(cache_folder())
    if options.json:
        total = sum(model.bytes for model in models)
        places = {"hub_cache": str(cache_root()), "cache": str(cache_folder())}
        rows = [asdict(model) for model in models]
        emit_json({"models": rows, "bytes": total, "cache_bytes": own, **places})
        return 0
    if models:
        print(table(("name", "size", "revision", "last used", "state"), [*map(_row, models)]))
    note(f"{'' if models else 'no models '}in `{cache_root()}`")
    note(f"and {format_size(own)} of notes in `{cache_folder()}`: `retinue rm {OWN}`")
    return 0


def _row(model: Cached) -> tuple[str, ...]:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.last_used))
    return model.name, format_size(model.bytes), model.revision, used, model.state
