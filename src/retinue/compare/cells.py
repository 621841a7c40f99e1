"""From single runs to one row a cell: a preset at a budget on a disk, with its spread and verdict.

Speeds and times are medians over the runs, with the least and the most; counts are those of the
first run, as routing is the same in all, and rates that depend on the disk's timing are medians.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from retinue.compare.grid import BASE, DEFAULT, Budget, Disk, Grid
from retinue.compare.quality import of
from retinue.compare.verdict import Spread, paired, spread, verdict
from retinue.lab.base import Row, number
from retinue.policy.presets import preset

SPREAD = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "hit_rate", "miss_rate")
MEDIAN = (
    *("stall_s", "prefill_stall_s", "decode_s", "prefill_s", "bytes_read_per_token"),
    *("bytes_read", "prefill_bytes_read", "hits", "pending", "misses", "pending_rate", "load_s"),
    "degraded_share",
)
MOST = ("peak_rss_bytes",)
SAME = (
    *("prefill_tokens", "decode_tokens", "slots", "resident_experts", "total_experts"),
    "budget_bytes",
)
PHASES = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that was measured: rows of single runs, of quality, of foresight, of the replay.

    The last is by cell, and empty where no replay was made.
    """

    live: Sequence[Row]
    quality: Sequence[Row]
    foresight: Sequence[Row] = ()
    simulated: Sequence[Row] = ()


def cells(grid: Grid, found: Found) -> list[Row]:
    """One row for each cell that ran, in the grid's order."""
    rows = []
    for budget in grid.budgets:
        for disk in grid.disks:
            place = _at(found.live, budget, disk)
            replayed = _at(found.simulated, budget, disk)
            for name in grid.presets:
                runs = _called(place, preset(name).name)
                if runs:
                    base = _called(place, BASE)
                    row = _cell(runs) | _against(runs, base, preset(name).slower)
                    row |= of(found.quality, preset(name).name, preset(name).exact, budget)
                    rows.append(row | _replay(replayed, preset(name).name, row))
    return rows


def _cell(runs: Sequence[Row]) -> Row:
    first = runs[0]
    row: Row = {key: first[key] for key in ("preset", "exact", "memory", "experts", "read_limit")}
    row["runs"] = len(runs)
    for key in SPREAD:
        row |= _spread(key, spread(_values(runs, key)))
    row |= {key: spread(_values(runs, key)).median for key in MEDIAN}
    row |= {key: max(_values(runs, key)) for key in MOST}
    row |= {key: first[key] for key in SAME}
    return row


def _against(runs: Sequence[Row], base: Sequence[Row], demanded: str) -> Row:
    """Each phase's speed against `on-demand`, with a verdict."""
    row: Row = {}
    if runs[0]["preset"] == BASE:
        return row
    for phase in PHASES:
        ratios = paired(runs, base, f"{phase}_tokens_per_s")
        if ratios is not None:
            row |= _spread(f"{phase}_against_on_demand", ratios)
            row[f"{phase}_verdict"] = verdict(ratios, demanded)
    return row


def _replay(rows: Sequence[Row], name: str, live: Row) -> Row:
    """What the replay says of a cell, and how far its hits are from Belady's; empty without one."""
    found = next((row for row in rows if row["preset"] == name), None)
    if found is None:
        return {}
    named = {f"simulated_{key}": value for key, value in found.items() if key in SIMULATED}
    best, hits = number(found, "belady_hit_rate"), number(found, "hit_rate")
    if best is not None and hits is not None:
        named |= {"belady_hit_rate": best, "belady_distance": best - hits}
    return named


SIMULATED = (
    *("hit_rate", "pending_rate", "miss_rate", "stall_s", "bytes_read_per_token"),
    *("degraded_share", "decode_tokens_per_s", "prefill_tokens_per_s", "reads_over_belady"),
)


def defaults(grid: Grid, found: Found) -> list[Row]:
    """For each budget and disk: the best exact preset, and whether `auto` is within its spread."""
    rows = []
    for budget in grid.budgets:
        for disk in grid.disks:
            place = [row for row in _at(found.live, budget, disk) if row["exact"]]
            for phase in PHASES:
                row = _default(place, f"{phase}_tokens_per_s")
                if row:
                    head = {**asdict(budget), "read_limit": disk.limit, "phase": phase}
                    rows.append(head | row)
    return rows


def _default(place: Sequence[Row], key: str) -> Row:
    names = dict.fromkeys(str(row["preset"]) for row in place)
    medians = {name: spread(_values(_called(place, name), key)).median for name in names}
    others = {name: value for name, value in medians.items() if name != DEFAULT}
    if DEFAULT not in medians or not others:
        return {}
    best = max(others, key=others.__getitem__)
    ratios = paired(_called(place, DEFAULT), _called(place, best), key)
    row: Row = {"best": best, "best_tokens_per_s": others[best]}
    row |= {"auto_tokens_per_s": medians[DEFAULT], "verdict": verdict(ratios)}
    return row | (_spread("against_best", ratios) if ratios is not None else {})


def _spread(key: str, found: Spread) -> Row:
    return {key: found.median, f"{key}_min": found.low, f"{key}_max": found.high}


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [number(row, key) or 0.0 for row in rows]


def _called(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["preset"] == name]


def _at(rows: Sequence[Row], budget: Budget, disk: Disk) -> list[Row]:
    where = {**asdict(budget), "read_limit": disk.limit}
    return [row for row in rows if all(row[key] == value for key, value in where.items())]
