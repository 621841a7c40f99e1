"""Where memory goes with the prompt's length and the batch, and what fewer experts leave for both.

Computed by the budget, which refuses what would not fit, and measured as the peak of a process of
its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from retinue.config import Config, format_size
from retinue.lab.base import NOTHING_YET, Chart, Column, Row, Series, number
from retinue.memory.budget import Split, split
from retinue.reproduce.experiment import Experiment
from retinue.reproduce.peak import Load, measure_peak
from retinue.reproduce.workbench import Workbench
from retinue.types import Facts

NAME = "memory"
SHARES = (60, 100)
BASE_TOKENS, BASE_BATCH = 512, 4
LENGTHS = (128, 512, 2047, 8191)
BATCHES = (4, 16)
LONGEST = 1 << 24  # tokens; where the search ends
PARTS = ("fixed", "kv", "workspace", "experts")
PRESET = "popular"  # what stays in memory is the share, whatever the prompt


@dataclass(frozen=True, slots=True)
class Point:
    """So many prompts of so many tokens at once, with a share of the experts in memory."""

    share: int
    tokens: int
    batch: int


def run(bench: Workbench) -> list[Row]:
    """Two rows of what equal memory holds, and those of `what` length and batch."""
    base = min(BASE_TOKENS, bench.facts.max_context - 1)
    longest = bench.facts.max_context - 1
    lengths = list(dict.fromkeys(min(tokens, longest) for tokens in LENGTHS))
    lengths = lengths[-2:] if bench.settings.quick else lengths
    points = [("length", Point(share, tokens, 1)) for share in SHARES for tokens in lengths]
    points += [("batch", Point(share, base, batch)) for share in SHARES for batch in BATCHES]
    rows = list(bench.once(NAME, "equal memory", partial(_equal, bench, base)))
    for what, point in points:
        key = f"{what}, {point.share} %, {point.tokens} tokens, {point.batch} at once"
        rows += bench.once(NAME, key, partial(_measured, bench, what, point))
    return rows


def computed(facts: Facts, config: Config, point: Point) -> Split:
    """What the budget gives each part; beyond the model's own context too."""
    context = point.tokens + 1
    room = config.room() | {"context": context, "experts": f"{point.share}%"}
    room |= {"kv_tokens": point.batch * context, "batch": point.batch, "memory": "100%"}
    return split(replace(facts, max_context=max(facts.max_context, context)), **room)


def total(limits: Split) -> int:
    """Bytes of all parts together."""
    return sum(int(getattr(limits, part)) for part in PARTS)


def _measured(bench: Workbench, what: str, point: Point) -> list[Row]:
    limits = computed(bench.facts, bench.config, point)
    config = replace(
        bench.config,
        preset=PRESET,
        experts=f"{point.share}%",
        context=point.tokens + 1,
        kv_tokens=point.batch * (point.tokens + 1),
        batch=point.batch,
    )
    load = Load(str(bench.folder), config, point.tokens, point.batch)
    row: Row = {"what": what, **asdict(point), "computed": total(limits)}
    row |= {part: int(getattr(limits, part)) for part in PARTS}
    return [row | {"peak": measure_peak(load, bench.stop)}]


def _equal(bench: Workbench, base: int) -> list[Row]:
    """How far the paper's two axes reach in the memory of all experts at the base point."""

    def fits(point: Point, limit: int) -> bool:
        return total(computed(bench.facts, bench.config, point)) <= limit

    few, whole = SHARES
    found: list[Row] = []
    one = total(computed(bench.facts, bench.config, Point(whole, base, 1)))
    reached = most(lambda tokens: fits(Point(few, tokens, 1), one), base)
    own = bench.facts.max_context
    row: Row = {"what": "equal length", "from": base, "to": reached, "factor": reached / base}
    found.append(row | {"limit_bytes": one, "own_limit": own})
    four = total(computed(bench.facts, bench.config, Point(whole, base, BASE_BATCH)))
    reached = most(lambda batch: fits(Point(few, base, batch), four), BASE_BATCH)
    row = {"what": "equal batch", "from": BASE_BATCH, "to": reached}
    found.append(row | {"factor": reached / BASE_BATCH, "limit_bytes": four})
    return found


def most(fits: Callable[[int], bool], least: int) -> int:
    """The largest count that fits; it is monotone, and `least` does."""
    low, high = least, least
    while high < LONGEST and fits(high * 2):
        low, high = high * 2, high * 2
    high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Peak over length and over batch; and the parts of the largest length."""
    found = []
    for what, key, label in (
        ("length", "tokens", "tokens of the prompt"),
        ("batch", "batch", "prompts at once"),
    ):
        series = []
        for share in SHARES:
            mine = [row for row in rows if row["what"] == what and row["share"] == share]
            x = [number(row, key) or 0.0 for row in mine]
            for name in ("computed", "peak"):
                y = [(number(row, name) or 0.0) / 2**20 for row in mine]
                series.append(Series(f"{share} % of the experts, {name}", x, y))
        if any(line.x for line in series):
            found.append(Chart(f"Memory against the {what}", label, "MiB", series, log_x=True))
    return found + _parts(rows)


def _parts(rows: Sequence[Row]) -> list[Chart]:
    lengths = [row for row in rows if row["what"] == "length"]
    if not lengths:
        return []
    bars = [f"{row['share']} %\n{row['tokens']}" for row in lengths]
    series = [
        Series(part, bars, [(number(row, part) or 0.0) / 2**20 for row in lengths])
        for part in PARTS
    ]
    return [Chart("Where the memory goes", "experts, and tokens", "MiB", series, kind="stacked")]


def verdict(rows: Sequence[Row]) -> str:
    """How much longer and how many more, and what the saving is made of."""
    equal = {row["what"]: row for row in rows if str(row["what"]).startswith("equal")}
    lengths = [row for row in rows if row["what"] == "length"]
    if len(equal) < 2 or not lengths:
        return NOTHING_YET
    length, batch = equal["equal length"], equal["equal batch"]
    saved = _saved(lengths)
    text = (
        f"With {SHARES[0]} % of the experts {format_size(saved)} are saved. In the memory that all"
        f" experts need at {length['from']} tokens there is room for {length['to']} tokens,"
        f" {length['factor']:.1f} times as many, as computed; and for {batch['to']} prompts"
        f" instead of {batch['from']}, {batch['factor']:.1f} times."
    )
    if (number(length, "to") or 0) > (number(length, "own_limit") or 0):
        text += f" The model itself has a context of {length['own_limit']} only."
    over = [row for row in rows if (number(row, "peak") or 0) > (number(row, "computed") or 1e18)]
    largest = max(lengths, key=lambda row: number(row, "computed") or 0)
    parts = ", ".join(f"{part} {format_size(number(largest, part) or 0)}" for part in PARTS)
    where = f" At {largest['tokens']} tokens with {largest['share']} %: {parts}."
    held = "Every measured peak is within what was computed."
    return text + where + (f" {len(over)} measured peaks are over it." if over else f" {held}")


def _saved(lengths: Sequence[Row]) -> float:
    tokens = lengths[0]["tokens"]
    experts = {row["share"]: number(row, "experts") for row in lengths if row["tokens"] == tokens}
    few, whole = (experts.get(share) or 0.0 for share in SHARES)
    return whole - few


EXPERIMENT = Experiment(
    name=NAME,
    title="Memory against prompt length and batch",
    claim=(
        "With 60 % of the experts, Mixtral-8x7B takes 59 GB instead of 96 GB at 512 tokens, and"
        " prompts 40 times as long (OpenMoE: 16 times) fit into the memory of all experts;"
        " batches grow from 4 to 18 (OpenMoE: to 8)."
    ),
    columns=(
        Column("what", "axis"),
        Column("share", "experts, %", ".0f"),
        Column("tokens", "tokens", ".0f"),
        Column("batch", "at once", ".0f"),
        Column("fixed", "fixed", "bytes"),
        Column("kv", "keys and values", "bytes"),
        Column("workspace", "workspace", "bytes"),
        Column("experts", "experts", "bytes"),
        Column("computed", "computed", "bytes"),
        Column("peak", "measured peak", "bytes"),
        Column("from", "from", ".0f"),
        Column("to", "to", ".0f"),
        Column("factor", "times", ".1f"),
    ),
    run=run,
    charts=charts,
    verdict=verdict,
    notes=(
        "Fixed is the interpreter, the libraries and every weight that is no routed expert. The"
        " paper's memory is a GPU's; here it is the resident memory of a process. Quality is that"
        " of the share, whatever the length.",
    ),
)
