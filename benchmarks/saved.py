"""Memory saved by keeping a part of the experts, as computed and as measured: `saved`."""

import random
import sys
from functools import partial

from benchmarks.child import in_turn, run_child, timed
from benchmarks.results import Document, Report, Row, compare, values
from benchmarks.setting import Setting

from retinue.cli.terminal import table
from retinue.config import format_size
from retinue.memory.home import locate
from retinue.model.survey import survey

SHARES = (20, 40, 60, 80, 100)
PROMPT_TOKENS, NEW_TOKENS = 64, 16
HEADER = ("experts", "resident", "computed", "measured", "saved, computed", "saved, measured")


def saved(setting: Setting) -> Report:
    """20 to 100 % of the experts: what a run needs by plan, and its peak memory."""
    shares = sorted(setting.shares or SHARES)
    engines = {f"{share} %": partial(timed, command(setting, share)) for share in shares}
    turns = in_turn(setting.runs, engines, must=f"{shares[-1]} %")
    computed = {name: plan(setting, name) for name in turns.runs}
    rows = [row(name, computed[name], runs) for name, runs in turns.runs.items()]
    return Report(rows, [shown(computed, turns.runs), *turns.notes], turns.runs)


def command(setting: Setting, share: int) -> list[str]:
    """A short run under an exact preset: which experts are in the slots does not change memory."""
    vocabulary, source = survey(locate(setting.model)).vocab_size, random.Random(0)
    tokens = setting.counts(PROMPT_TOKENS, NEW_TOKENS)
    ids = " ".join(str(source.randrange(vocabulary)) for _ in range(tokens["prompt_tokens"]))
    words = [sys.executable, "-m", "retinue", "run", str(setting.model), ids, "--token-ids"]
    words += ["--max-new-tokens", str(tokens["new_tokens"]), "--ignore-eos", "--json"]
    return [*words, *_room(setting, f"{share} %")]


def _room(setting: Setting, share: str) -> list[str]:
    tokens = setting.counts(PROMPT_TOKENS, NEW_TOKENS)
    context = tokens["prompt_tokens"] + tokens["new_tokens"] + 1
    return ["--context", str(context), "--experts", share.replace(" ", "")]


def plan(setting: Setting, share: str) -> Document:
    """What `retinue plan` says of the same room."""
    words = [sys.executable, "-m", "retinue", "plan", str(setting.model), "--json"]
    return run_child([*words, *_room(setting, share)]).document


def needed(document: Document) -> int:
    """Bytes of all parts that a plan places."""
    return int(sum(document["placement"].values()))


def row(share: str, computed: Document, runs: list[Document]) -> Row:
    """The measured peak within what was computed."""
    peaks = [float(run["stats"]["peak_rss_bytes"]) for run in runs]
    plans = [float(needed(computed))] * len(peaks)
    within = all(peak <= most for peak, most in zip(peaks, plans, strict=True))
    title = ("saved", f"{share}: peak memory", "bytes")
    return compare(title, peaks, "computed", plans, less_is_better=True, ok=within)


def shown(computed: dict[str, Document], runs: dict[str, list[Document]]) -> str:
    """One line a share, against the largest one."""
    peaks = {
        name: max(values([run["stats"] for run in each], "peak_rss_bytes"))
        for name, each in runs.items()
    }
    whole = list(runs)[-1]
    lines = [
        (
            name,
            str(computed[name]["resident_experts"]),
            format_size(needed(computed[name])),
            format_size(peaks[name]),
            format_size(needed(computed[whole]) - needed(computed[name])),
            format_size(peaks[whole] - peaks[name]),
        )
        for name in runs
    ]
    return "\n" + table(HEADER, lines)
