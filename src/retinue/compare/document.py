"""What a comparison found, as JSON: flat rows, so that a table can be made of each list."""

from collections.abc import Mapping, Sequence
from typing import Any

from retinue.compare import claims, foresight, live, quality, replayed
from retinue.compare.cells import Found, cells, defaults
from retinue.compare.foresight import NEXT_GATE
from retinue.compare.grid import Grid
from retinue.compare.measures import Seen
from retinue.lab.base import Row
from retinue.lab.ledger import Ledger

ENTRIES = (live.NAME, quality.NAME, foresight.NAME, replayed.NAME)  # of the ledger


def found(grid: Grid, ledger: Ledger) -> Found:
    """What the ledger has of the grid."""
    rows = [ledger.entry(name).rows for name in ENTRIES]
    measured, scores, _, replays = ([row for row in each if _held(grid, row)] for each in rows)
    return Found(measured, scores, rows[2], replays)


def _held(grid: Grid, row: Row) -> bool:
    return "preset" in row and grid.holds(row)


def document(model: str, grid: Grid, setting: Mapping[str, Any], ledger: Ledger) -> dict[str, Any]:
    """Everything; docs/compare.md says what the keys mean."""
    seen = found(grid, ledger)
    rows = cells(grid, seen)
    return {
        "model": model,
        "presets": grid.names,
        "memory": list(dict.fromkeys(budget.memory for budget in grid.budgets)),
        "experts": list(dict.fromkeys(budget.experts for budget in grid.budgets)),
        "read_limits": [disk.limit for disk in grid.disks],
        "runs": grid.runs,
        "new_tokens": grid.new_tokens,
        "setting": dict(setting),
        "cells": rows,
        "auto": defaults(grid, seen),
        "tasks": [row for row in seen.quality if row["task"] != "all"],
        "foresight": list(seen.foresight),
        "claims": claims.rows(Seen(rows, seen.foresight)),
        "refused": refused(grid, ledger),
    }


def refused(grid: Grid, ledger: Ledger) -> list[Row]:
    """Why presets of the grid could not run, once for each preset and reason."""
    seen = dict[tuple[str, str], Row]()
    for name in ENTRIES:
        for key, reason in ledger.entry(name).left_out.items():
            what = key.split(", ")[0]
            told = name == replayed.NAME and what in {preset for preset, _ in seen}
            if what in (*grid.presets, *grid.names, NEXT_GATE) and not told:
                seen.setdefault((what, reason), {"preset": what, "reason": reason})
    return list(seen.values())


def slower(cells: Sequence[Row], verdict: str) -> dict[str, int]:
    """In how many cells each exact preset has that verdict, in either phase."""
    counts: dict[str, int] = {}
    for row in cells:
        if row["exact"] and verdict in (row.get("decode_verdict"), row.get("prefill_verdict")):
            counts[str(row["preset"])] = counts.get(str(row["preset"]), 0) + 1
    return counts
