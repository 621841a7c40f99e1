"""How fast this machine multiplies by weights, as measured and remembered. Imports no torch."""

import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from retinue.memory.machine import Rate, Rates, cache_folder

# What decides which kernels run: the library that was built, and two switches.
_LIBRARY = Path(__file__).resolve().parents[1] / "libretinue.so"
_SWITCHES = ("RETINUE_NATIVE", "RETINUE_ISA")
WEIGHTS_BYTES = 192 << 20  # that are multiplied by: more than caches hold


def known_rates(
    threads: int,
    formats: Collection[str],
    *,
    fresh: bool = False,
    at_most_bytes: int = WEIGHTS_BYTES,
) -> Rates:
    """The rates of `formats`: remembered, or measured now, in a third of a second each.

    Measuring takes `at_most_bytes` of memory for a moment, or what one expert takes.
    """
    known = dict(remembered_rates(threads))
    unknown = [name for name in formats if fresh or name not in known]
    if not unknown:
        return known
    from retinue.memory.probe import measure_rates

    known |= measure_rates(threads, unknown, at_most_bytes=min(at_most_bytes, WEIGHTS_BYTES))
    store = cache_folder() / _name(threads)
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps({name: asdict(rate) for name, rate in known.items()}))
    return known


def remembered_rates(threads: int) -> Rates:
    """The rates that were measured last with these kernels."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        content = json.loads((cache_folder() / _name(threads)).read_text())
        return {name: Rate(**rate) for name, rate in content.items()}
    return {}


def _name(threads: int) -> str:
    switches = "-".join(os.environ.get(name, "") for name in _SWITCHES)
    try:
        built = int(_LIBRARY.stat().st_mtime)
    except OSError:
        built = 0
    return f"rates-{threads}-{built}-{switches}.json"
