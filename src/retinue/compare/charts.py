"""The plots of a comparison: speed against share, loss against bytes, hits against Belady's."""

from collections.abc import Callable, Iterable, Sequence

from retinue.compare.grid import Disk, Grid
from retinue.lab.base import Chart, Row, Series, number

MANY = 8  # lines that one plot can show apart
MIB = 1 << 20


def speed(grid: Grid, cells: Sequence[Row]) -> list[Chart]:
    """Decoding and prefill over the share of resident experts, plots for each disk.

    None where there is but one share: a table says it better.
    """
    if len({share(row) for row in cells}) < 2:
        return []
    return [
        Chart(
            f"{phase.capitalize()}{kind}, {disk.label}",
            "experts in memory, %",
            "tokens a second",
            series,
        )
        for disk in grid.disks
        for phase in ("decode", "prefill")
        for kind, rows in _kinds(_on(cells, disk))
        if (series := _lines(rows, share, f"{phase}_tokens_per_s"))
    ]


def quality(cells: Sequence[Row], disk: Disk) -> list[Chart]:
    """Loss added over what is read for a token; exact presets lie on the line of no loss."""
    rows = [row for row in _on(cells, disk) if not row["exact"] and loss_added(row) is not None]
    return [
        Chart(
            f"Loss added against bytes read{which}",
            "MiB read a token",
            "nats a token",
            _lines(part, _mib_read, loss_added),
            reference=0.0,
            reference_label="exact",
        )
        for which, part in _parts(rows)
    ]


def hits(cells: Sequence[Row], disk: Disk) -> list[Chart]:
    """Hit rates over the share, and what Belady's rule would reach, where it was replayed.

    That comes last, so that a preset has the colour that it has in other plots.
    """
    rows = [row for row in _on(cells, disk) if row["exact"]]
    if len({share(row) for row in rows}) < 2:
        return []
    best = {share(row): number(row, "belady_hit_rate") for row in rows}
    known = {x: 100 * y for x, y in sorted(best.items()) if y is not None}
    oracle = [Series("Belady, replayed", list(known), list(known.values()))] if known else []
    return [
        Chart(
            f"Hit rate{which}, {disk.label}",
            "experts in memory, %",
            "hits, %",
            [*_lines(part, share, lambda row: 100 * (number(row, "hit_rate") or 0)), *oracle],
        )
        for which, part in _parts(rows)
    ]


def _mib_read(row: Row) -> float:
    return (number(row, "bytes_read_per_token") or 0.0) / MIB


def share(row: Row) -> float:
    """Resident experts of all, in percent."""
    slots, total = number(row, "slots") or 0.0, number(row, "total_experts") or 1.0
    return round(100 * min(slots / total, 1.0), 1)


def loss_added(row: Row) -> float | None:
    """Nats a token above the plain model's; None where it was not measured."""
    mine, plain = number(row, "nll"), number(row, "nll_plain")
    return None if mine is None or plain is None else mine - plain


def _kinds(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    """All in one plot while they can be told apart; else exact and approximate ones, then parts."""
    if len({row["preset"] for row in rows}) <= MANY:
        yield "", rows
        return
    for exact, kind in ((True, " of exact presets"), (False, " of approximate presets")):
        for which, part in _parts([row for row in rows if row["exact"] is exact]):
            yield kind + which, part


def _parts(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    """As many presets at once as can be told apart, and which part of how many that is."""
    names = list(dict.fromkeys(row["preset"] for row in rows))
    parts = [names[at : at + MANY - 1] for at in range(0, len(names), MANY - 1)]
    for place, part in enumerate(parts, 1):
        which = f" ({place} of {len(parts)})" if len(parts) > 1 else ""
        yield which, [row for row in rows if row["preset"] in part]


def _lines(
    rows: Sequence[Row], x: Callable[[Row], float], y: str | Callable[[Row], float | None]
) -> list[Series]:
    """A line for each preset, by growing x; where `y` is a key, with the least and the most."""
    found = []
    for name in dict.fromkeys(str(row["preset"]) for row in rows):
        mine = sorted((row for row in rows if row["preset"] == name), key=x)
        values = [number(row, y) if isinstance(y, str) else y(row) for row in mine]
        if all(value is None for value in values):
            continue
        low, high = (
            [number(row, f"{y}_{end}") for row in mine] if isinstance(y, str) else []
            for end in ("min", "max")
        )
        found.append(Series(name, [x(row) for row in mine], values, low, high))
    return found


def _on(cells: Sequence[Row], disk: Disk) -> list[Row]:
    return [row for row in cells if row["read_limit"] == disk.limit]
