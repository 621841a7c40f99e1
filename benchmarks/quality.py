"""Loss and agreement with a part of the experts, and what is read for it: `quality`."""

import sys

from benchmarks.child import ChildFailedError, run_child, say
from benchmarks.methods import BY_TASK, EMOE, FETCH, ON_DEMAND, POPULAR, RANDOM, Method, model_words
from benchmarks.results import Document, Report, Row, compare
from benchmarks.setting import Setting

from retinue.cli.terminal import table
from retinue.config import format_size

FORECASTERS = ("popularity", "running-mean", "previous-prompt", "own-prefill", "emoe-a", "emoe-l")
ABOVE = (0.1, 0.15, 0.2, 0.3)  # beside the preset's own
METHODS = (
    ON_DEMAND,  # first: its bytes are what the others' are compared with
    RANDOM,
    POPULAR,
    BY_TASK,
    *(Method("emoe", forecaster=name) for name in FORECASTERS),
    FETCH,
    *(Method("emoe-fetch", fetch_above=above) for above in ABOVE),
)
SHARES = (20, 40, 60, 80)
# Of `emoe-fetch`, by share: how much of the plain loss may be added, and how many times fewer
# bytes than `on-demand` it reads.
PROMISED = {20: (0.02, 3.0), 40: (0.01, 5.0)}
CLEARLY = 1.2  # times the loss that `emoe` adds is what `random` adds at least
HEADER = ("experts", "method", "loss", "added", "by task", "agreement", "degraded", "read", "fewer")


def quality(setting: Setting) -> Report:
    """20 to 80 % of the experts: loss, agreement and bytes of every preset and forecaster."""
    cells: dict[str, dict[str, Document]] = {}
    notes = []
    for share in setting.shares or SHARES:
        for method in METHODS:
            say(f"  {share} %: {method.name}")
            try:
                document = run_child(command(setting, share, method)).document
            except ChildFailedError as error:
                notes.append(f"{share} %, {method.name} is left out: {error}")
            else:
                cells.setdefault(f"{share} %", {})[method.name] = document
    runs = {
        f"{share}, {name}": [document]
        for share, found in cells.items()
        for name, document in found.items()
    }
    return Report(rows(cells), [shown(cells), *notes], runs)


def command(setting: Setting, share: int, method: Method) -> list[str]:
    """`retinue eval` of one cell. A pass is the same whenever it runs, so one is enough."""
    words = [sys.executable, "-m", "retinue", "eval", *model_words(setting), "--json"]
    return [*words, "--experts", f"{share}%", *method.words]


def rows(cells: dict[str, dict[str, Document]]) -> list[Row]:
    """What was promised: of `emoe` at each share, of `emoe-fetch` where `PROMISED` says so."""
    found = []
    mean = Method("emoe", forecaster="running-mean").name  # what `emoe` is by default
    for share, cell in cells.items():
        for other, promised in ((RANDOM.name, CLEARLY), (BY_TASK.name, 1.0)):
            if {mean, other} <= set(cell):
                title = ("quality", f"{share}: {EMOE.name}, loss added", "nats")
                ours, theirs = [added(cell[mean])], [added(cell[other])]
                row = compare(title, ours, other, theirs, less_is_better=True)
                found.append(row.promised(promised))
        if FETCH.name in cell:
            found += _fetching(share, cell)
    return found


def _fetching(share: str, cell: dict[str, Document]) -> list[Row]:
    """`emoe-fetch` against the plain loss, and against the reads of `on-demand`."""
    most, fewer = PROMISED.get(int(share.removesuffix(" %")), (0.0, 0.0))
    ours, what = cell[FETCH.name], f"{share}: {FETCH.name}"
    losses = [ours["nll"]], "plain", [ours["nll_plain"]]
    row = compare(("quality", f"{what}, loss", "nats"), *losses, less_is_better=True)
    found = [row.promised(1 / (1 + most) if most else 0.0)]
    if ON_DEMAND.name in cell:
        read = [[cell[name]["bytes_read"]] for name in (FETCH.name, ON_DEMAND.name)]
        title = ("quality", f"{what}, read", "bytes")
        row = compare(title, read[0], ON_DEMAND.name, read[1], less_is_better=True)
        found.append(row.promised(fewer))
    return found


def added(document: Document) -> float:
    """Nats a token over the plain model."""
    return float(document["nll"] - document["nll_plain"])


def shown(cells: dict[str, dict[str, Document]]) -> str:
    """Everything as one table; `by task` are the least and the most that a task's loss grew."""
    lines = []
    for share, cell in cells.items():
        base = cell.get(ON_DEMAND.name, {}).get("bytes_read")
        lines += [_line(share, name, document, base) for name, document in cell.items()]
    return "\n" + table(HEADER, lines)


def _line(share: str, name: str, document: Document, base: int | None) -> tuple[str, ...]:
    tasks = [added(task) / task["nll_plain"] for task in document["tasks"].values()]
    read = document["bytes_read"]
    return (
        share,
        name,
        f"{document['nll']:.4f}",
        f"{added(document) / document['nll_plain']:+.2%}",
        f"{min(tasks):+.2%} to {max(tasks):+.2%}",
        f"{document['agreement']:.3f}",
        f"{document['degraded_share']:.3f}",
        format_size(read),
        f"{base / read:.1f}" if base and read else "",
    )
