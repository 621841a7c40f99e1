"""How fast this machine multiplies by weights, as measured and remembered. Imports no torch."""

import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retinue.memory.machine import (
    Rate,
    Rates,
    cache_folder,
    core_times,
    disturbed_since,
    remember,
)

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

    Measuring takes `at_most_bytes` of memory for a moment, or what one expert takes. What is
    measured while other programs are at work is only remembered until it is measured without them.
    """
    known = remembered_rates(threads, quiet=True)
    unknown = [name for name in formats if fresh or name not in known]
    if not unknown:
        return known
    from retinue.memory.probe import measure_rates

    began = core_times()
    measured = measure_rates(threads, unknown, at_most_bytes=min(at_most_bytes, WEIGHTS_BYTES))
    disturbed = disturbed_since(began)
    records = _records(threads)
    for name, rate in measured.items():
        if not (disturbed and name in known):
            records[name] = {**asdict(rate), "disturbed": disturbed}
    remember(cache_folder() / _name(threads), records)
    return {**known, **measured}


def remembered_rates(threads: int, *, quiet: bool = False) -> Rates:
    """The rates that were measured last with these kernels.

    quiet: only those that were measured while no other program was at work.
    """
    rates = {}
    with suppress(TypeError, AttributeError):
        for name, record in _records(threads).items():
            if not record.pop("disturbed", False) or not quiet:
                rates[name] = Rate(**record)
    return rates


def _records(threads: int) -> dict[str, dict[str, Any]]:
    """What is remembered, by format."""
    with suppress(OSError, ValueError):
        content = json.loads((cache_folder() / _name(threads)).read_text())
        return content if isinstance(content, dict) else {}
    return {}


def _name(threads: int) -> str:
    switches = "-".join(os.environ.get(name, "") for name in _SWITCHES)
    try:
        built = int(_LIBRARY.stat().st_mtime)
    except OSError:
        built = 0
    return f"rates-{threads}-{built}-{switches}.json"
