"""A comparison as a report: who is never worse than none, what each costs, what papers claim."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from retinue.compare.charts import hits, loss_added, quality, speed
from retinue.compare.document import slower
from retinue.compare.grid import BASE, DEFAULT, PLAIN, Budget, Disk, Grid
from retinue.compare.verdict import DEMANDED, FASTER, SLOWER, WITHIN, Spread, spread
from retinue.lab.base import Chart, Column, Row, counted, number
from retinue.lab.drawing import HOW_TO_GET, can_draw, draw
from retinue.lab.page import Figure, Report, Section, Table
from retinue.lab.tables import said, table_of

SIGNS = {FASTER: "▲", WITHIN: "=", SLOWER: "▼"}
DEMANDED_SIGN = "▽"
NEAR = 0.15  # of a replay's speed to the measured one

CELL = (
    Column("preset", "preset"),
    Column(
        "decode_tokens_per_s",
        "decode, tokens/s",
        ".1f",
        "decode_tokens_per_s_min",
        "decode_tokens_per_s_max",
    ),
    Column(
        "prefill_tokens_per_s",
        "prefill, tokens/s",
        ".0f",
        "prefill_tokens_per_s_min",
        "prefill_tokens_per_s_max",
    ),
    Column("ttft_s", "first token, s", ".3f", "ttft_s_min", "ttft_s_max"),
    Column("stall_share", "stalled", ".0%"),
    Column("bytes_read_per_token", "read a token", "bytes"),
    Column("hit_rate", "hits", ".1%", "hit_rate_min", "hit_rate_max"),
    Column("pending_rate", "pending", ".1%"),
    Column("simulated_reads_over_belady", "reads over Belady's", ".2f"),
    Column("degraded_share", "degraded", ".1%"),
    Column("quality", "loss added"),
    Column("peak_rss_bytes", "peak", "bytes"),
    Column("replayed", "decode, replayed"),
)
CLAIM = (
    Column("who", "preset"),
    Column("claim", "its paper's claim"),
    Column("found", "found here"),
    Column("why", "where they differ, why"),
)
AUTO = (
    Column("experts", "experts"),
    Column("memory", "memory"),
    Column("read_limit", "disk"),
    Column("phase", "phase"),
    Column("best", "best other exact preset"),
    Column("best_tokens_per_s", "its tokens/s", ".1f"),
    Column("auto_tokens_per_s", "auto", ".1f"),
    Column("against_best", "auto over it", ".2f", "against_best_min", "against_best_max"),
    Column("verdict", "verdict"),
)


def report(grid: Grid, document: Mapping[str, Any]) -> Report:
    """The page's parts; plots only where matplotlib is installed, which the page says."""
    cells: list[Row] = document["cells"]
    sections = [
        _never_worse(grid, cells),
        _default(document["auto"]),
        _speed(grid, cells),
        _quality(grid, cells, document["tasks"]),
        _hits(grid, cells),
        _all(grid, cells),
        _claims(document["claims"]),
        _refused(document["refused"]),
    ]
    notes = [] if can_draw() else [f"Plots are missing: matplotlib is not installed: {HOW_TO_GET}"]
    return Report(
        title=f"Presets side by side: {document['model']}",
        lead="The same prompts and the same tokens through every preset, at equal memory, live.",
        claim_heading="The papers",
        found_heading="Found here",
        setting=[(key.replace("_", " "), said(value)) for key, value in _setting(document)],
        sections=[section for section in sections if section is not None],
        notes=notes,
    )


def _setting(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    limits = [limit or "none" for limit in document["read_limits"]]
    amount = f"{counted(int(document['runs']), 'run')}, the presets in balanced order"
    shown = {"experts": [share or "as memory allows" for share in document["experts"]]}
    return [
        *document["setting"].items(),
        *({"memory": document["memory"]} | shown | {"read limits": limits}).items(),
        ("repeated", amount),
    ]


def _never_worse(grid: Grid, cells: Sequence[Row]) -> Section:
    """Each exact preset against `on-demand`, in both phases."""
    exact = [row for row in cells if row["exact"] and row["preset"] != BASE]
    judged = [row for row in exact if row.get("decode_verdict") is not None]
    places = len(grid.budgets) * len(grid.disks)
    found = (
        f"{_slower(cells, SLOWER, places)} {_slower(cells, DEMANDED, places)}".strip()
        if judged
        else "No verdict: there has to be more than one run."
    )
    tables = [_matrix(grid, exact, phase) for phase in ("decode", "prefill")]
    runs = max((int(number(row, "runs") or 0) for row in cells), default=0)
    return Section(
        "never-worse",
        f"Never worse than {BASE}",
        "",
        found,
        tables=tables if judged else [],
        notes=[
            "The median of the runs' ratios, each run beside the same run of"
            f" `{BASE}`, with the least and the most. {SIGNS[FASTER]} faster in every run,"
            f" {SIGNS[SLOWER]} slower in every run, {SIGNS[WITHIN]} within the spread,"
            f" {DEMANDED_SIGN} slower as its paper demands. Of two equals, {counted(runs, 'run')}"
            f" would call the one slower by chance {0.5**runs:.1%} of the time.",
        ]
        if judged
        else [],
    )


def _slower(cells: Sequence[Row], verdict: str, places: int) -> str:
    """Who has that verdict, and in how many places; of what papers demand nothing, if nobody."""
    counts = slower(cells, verdict)
    names = ", ".join(f"`{name}` in {count}" for name, count in counts.items())
    if verdict == DEMANDED:
        return f"As its paper demands: {names}." if names else ""
    if not names:
        return f"No exact preset is slower than `{BASE}` at any of {places} places."
    return f"Slower than `{BASE}` in decoding or prefill, of {places} places: {names}."


def _matrix(grid: Grid, rows: Sequence[Row], phase: str) -> Table:
    """A row for each preset, a column for each place."""
    places = [(budget, disk) for disk in grid.disks for budget in grid.budgets]
    key = f"{phase}_against_on_demand"
    lines = []
    for name in dict.fromkeys(str(row["preset"]) for row in rows):
        mine = [row for row in rows if row["preset"] == name]
        lines.append([name, *[_ratio(_in(mine, *place), key, phase) for place in places]])
    header = ["preset", *[f"{budget.label}, {disk.label}" for budget, disk in places]]
    caption = f"{phase.capitalize()} speed over that of {BASE}"
    return Table(header, lines, [False, *[True] * len(places)], caption)


def _ratio(row: Row | None, key: str, phase: str) -> str:
    if row is None or number(row, key) is None:
        return ""
    middle, low, high = (number(row, f"{key}{end}") or 0.0 for end in ("", "_min", "_max"))
    verdict = row.get(f"{phase}_verdict")
    sign = SIGNS.get(str(verdict), DEMANDED_SIGN) if verdict else ""
    return f"{middle:.2f} {sign}\n{low:.2f} to {high:.2f}"


def _default(rows: Sequence[Row]) -> Section | None:
    if not rows:
        return None
    judged = [row for row in rows if row["verdict"] is not None]
    below = [row for row in judged if str(row["verdict"]).startswith("slower")]
    found = (
        f"`{DEFAULT}` is within the spread of the best exact preset, or faster, in"
        f" {len(judged) - len(below)} of {len(judged)} cells and phases."
        if judged
        else "No verdict: there has to be more than one run."
    )
    shown = [row | {"read_limit": row["read_limit"] or "as it is"} for row in rows]
    same = {key for key in ("memory", "experts") if len({row[key] for row in rows}) == 1}
    return Section(
        "auto",
        "The default against the best",
        "",
        found,
        tables=[table_of([each for each in AUTO if each.key not in same], shown)],
        notes=["The best of many is partly lucky, which counts against the default."],
    )


def _speed(grid: Grid, cells: Sequence[Row]) -> Section:
    fastest = []
    for disk in grid.disks:
        for budget in grid.budgets:
            rows = _at(cells, budget, disk)
            best = max(rows, key=lambda row: number(row, "decode_tokens_per_s") or 0, default=None)
            if best is not None:
                speed_ = number(best, "decode_tokens_per_s") or 0.0
                fastest.append(f"{budget.label}, {disk.label}: {best['preset']} ({speed_:.1f})")
    found = f"Fastest at decoding, tokens a second: {'; '.join(fastest)}." if fastest else ""
    figures = _figures("speed", speed(grid, cells))
    return Section("speed", "Speed against the share in memory", "", found, figures)


def _quality(grid: Grid, cells: Sequence[Row], tasks: Sequence[Row]) -> Section | None:
    rows = [row for row in tasks if row["preset"] != PLAIN]
    if not rows:
        return None
    names = list(dict.fromkeys(str(row["task"]) for row in tasks))
    plain = {row["task"]: number(row, "nll_plain") or 0.0 for row in tasks}
    lines = [["plain (its loss)", "", "", *[f"{plain[name]:.3f}" for name in names]]]
    for head in dict.fromkeys((row["preset"], row["memory"], row["experts"]) for row in rows):
        mine = {row["task"]: row for row in rows if _head(row) == head}
        scores = [_score(mine[name]) if name in mine else "" for name in names]
        lines.append([*[str(part or "") for part in head], *scores])
    header = ["preset", "memory", "experts", *names]
    caption = "Loss added, nats a token, and below it agreement with the plain model's next token"
    table = Table(header, lines, [False, False, False, *[True] * len(names)], caption)
    return Section(
        "quality",
        "What approximate presets cost",
        "",
        "Exact presets give the plain model's tokens: no loss is added, and they agree with it.",
        _figures("quality", quality(cells, grid.disks[0])),
        [table],
    )


def _head(row: Row) -> tuple[object, ...]:
    return row["preset"], row["memory"], row["experts"]


def _score(row: Row, word: str = "") -> str:
    added = loss_added(row) or 0.0
    return f"{added:+.3f}\n{word}{number(row, 'agreement') or 0.0:.3f}"


def _hits(grid: Grid, cells: Sequence[Row]) -> Section:
    exact = [row for row in cells if row["exact"]]
    over: dict[str, list[float]] = {}
    for row in exact:
        if (ratio := number(row, "simulated_reads_over_belady")) is not None:
            over.setdefault(str(row["preset"]), []).append(ratio)
    words = [f"`{name}` {spread(each).median:.2f}" for name, each in over.items()]
    found = (
        f"Bytes read over those of Belady's rule, replayed, median over places: {', '.join(words)}."
        if words
        else "There was no replay to compare with."
    )
    figures = hits(cells, grid.disks[0])
    title = "Hits, and what is possible"
    notes = [
        "Belady's rule knows what comes, and reads nothing ahead: who does may hit more often, and"
        " still reads as much or more.",
        *_agreement(exact),
    ]
    return Section(
        "hits", title, "", found, _figures("hits", figures), notes=notes if words else ()
    )


def _agreement(rows: Sequence[Row]) -> list[str]:
    """How far the replay is from what ran, over exact presets; nothing without a replay."""
    apart = {
        "points of hit rate": _apart(rows, "hit_rate", share=False),
        "% of the bytes read": _apart(rows, "bytes_read_per_token"),
        "% of the speed of decoding": _apart(rows, "decode_tokens_per_s"),
    }
    words = [
        f"{100 * found.median:.1f} (at most {100 * found.high:.1f}) {what}"
        for what, found in apart.items()
        if found is not None
    ]
    speeds = _differences(rows, "decode_tokens_per_s")
    near = sum(each <= NEAR for each in speeds)
    return [
        f"Between replay and live, median over exact cells: {', '.join(words)}. The speed of"
        f" decoding is within {NEAR:.0%} in {near} of {len(speeds)} cells."
    ]


def _apart(rows: Sequence[Row], key: str, *, share: bool = True) -> Spread | None:
    apart = _differences(rows, key, share=share)
    return spread(apart) if apart else None


def _differences(rows: Sequence[Row], key: str, *, share: bool = True) -> list[float]:
    """How far the replay's number is from the measured one in each cell, in parts of this one."""
    pairs = [(number(row, key), number(row, f"simulated_{key}")) for row in rows]
    known = [(live, other) for live, other in pairs if live is not None and other is not None]
    return [abs(other - live) / (live if share else 1) for live, other in known if live]


def _all(grid: Grid, cells: Sequence[Row]) -> Section:
    tables = []
    for disk in grid.disks:
        for budget in grid.budgets:
            rows = [_shown(row) for row in _at(cells, budget, disk)]
            if rows:
                caption = f"{budget.label}, {disk.label}"
                tables.append(replace(table_of(CELL, rows), caption=caption))
    found = "Medians over the runs, with the least and the most; counts are of decoding."
    return Section("cells", "Every cell", "", found, tables=tables)


def _shown(row: Row) -> Row:
    seconds = number(row, "decode_s") or 0.0
    shown = row | {"stall_share": (number(row, "stall_s") or 0.0) / seconds if seconds else None}
    if not row["exact"]:
        shown["preset"] = f"{row['preset']}\napproximate"
        if loss_added(row) is not None:
            shown["quality"] = _score(row, "agrees ")
    else:
        shown["degraded_share"] = None
    speed_, rate = (number(row, f"simulated_{key}") for key in ("decode_tokens_per_s", "hit_rate"))
    if speed_ is not None and rate is not None:
        shown["replayed"] = f"{speed_:.1f}\nhits {rate:.1%}"
    return shown


def _claims(rows: Sequence[Row]) -> Section:
    shown = [
        {
            "who": f"{row['preset']}\n{row['paper']}",
            "claim": f"{row['claim']}\n{row['where']}",
            "found": f"{row['found']}\n{row['measure']}",
            "why": row["why"],
        }
        for row in rows
    ]
    known = [each for each, row in zip(shown, rows, strict=True) if "found_median" in row]
    others = [each for each in shown if each not in known]
    captions = ("Beside what was found, over all places", "Without a counterpart in this run")
    tables = [
        replace(table_of(CLAIM, each), caption=caption)
        for each, caption in zip((known, others), captions, strict=True)
        if each
    ]
    found = f"{len(known)} of {len(rows)} claims have a counterpart in this run."
    return Section("claims", "What the papers claim", "", found, tables=tables)


def _refused(rows: Sequence[Row]) -> Section | None:
    if not rows:
        return None
    table = table_of((Column("preset", "preset"), Column("reason", "reason")), rows)
    found = f"{counted(len(rows), 'refusal')}."
    return Section("refused", "What could not run", "", found, tables=[table])


def _figures(name: str, charts: Sequence[Chart]) -> list[Figure]:
    if not can_draw():
        return []
    return [Figure(draw(chart, f"{name}-{at}"), chart.title) for at, chart in enumerate(charts)]


def _at(cells: Sequence[Row], budget: Budget, disk: Disk) -> list[Row]:
    where = {**asdict(budget), "read_limit": disk.limit}
    return [row for row in cells if all(row[key] == value for key, value in where.items())]


def _in(cells: Sequence[Row], budget: Budget, disk: Disk) -> Row | None:
    return next(iter(_at(cells, budget, disk)), None)
