"""Decoding with few experts and a slow disk, from exact to eMoE's point: `slow-disk`."""

import sys
from functools import partial

from benchmarks.child import in_turn, timed
from benchmarks.methods import BY_TASK, EMOE, FETCH, ON_DEMAND, Method, model_words
from benchmarks.results import Document, Report, Row, compare, median_of, values
from benchmarks.setting import Setting

from retinue.cli.terminal import table
from retinue.config import format_size

SHARES = (40, 20)
LIMITS = (100, 300, 1000)  # MB/s
ABOVE = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
METHODS = (
    ON_DEMAND,
    Method("auto"),
    BY_TASK,
    EMOE,
    FETCH,
    *(Method("emoe-fetch", fetch_above=above) for above in ABOVE),
)
OURS = (EMOE.name, FETCH.name)
NEW_TOKENS = 32
MEASURES = (
    ("decode", "decode_tokens_per_s", "tokens/s", False),
    ("prefill", "prefill_tokens_per_s", "tokens/s", False),
    ("first token", "ttft_s", "s", True),
)
HEADER = ("experts", "MB/s", "method", "decode", "x on-demand", "prefill", "first token, s")
HEADER += ("degraded", "read a token")


def slow_disk(setting: Setting) -> Report:
    """40 and 20 % of the experts, 100 to 1000 MB/s: on-demand against presets that replace."""
    report, lines = Report(), list[tuple[str, ...]]()
    for share in setting.shares or SHARES:
        for limit in setting.read_limits or LIMITS:
            engines = {
                method.name: partial(timed, command(setting, share, limit, method))
                for method in METHODS
            }
            turns = in_turn(setting.runs, engines, must=ON_DEMAND.name)
            where = f"{share} %, {limit} MB/s"
            report.rows.extend(rows(where, turns.runs))
            report.runs.update({f"{where}, {name}": each for name, each in turns.runs.items()})
            report.notes.extend(f"{where}: {text}" for text in turns.notes)
            lines += [line(share, limit, name, turns.runs) for name in turns.runs]
    report.notes.insert(0, "\n" + table(HEADER, lines))
    return report


def command(setting: Setting, share: int, limit: int, method: Method) -> list[str]:
    """The child that answers the texts under `method`."""
    words = [sys.executable, "-m", "benchmarks.slow_disk_child", *model_words(setting)]
    words += ["--experts", f"{share}%", "--read-limit", f"{limit}MB", *method.words]
    return [*words, "--new-tokens", str(setting.new_tokens or NEW_TOKENS)]


def rows(where: str, runs: dict[str, list[Document]]) -> list[Row]:
    """The paper's point and the default of `emoe-fetch` against `on-demand`."""
    return [
        compare(
            ("slow-disk", f"{where}, {name}: {what}", unit),
            values(runs[name], key),
            ON_DEMAND.name,
            values(runs[ON_DEMAND.name], key),
            less_is_better=less,
        )
        for name in OURS
        if name in runs
        for what, key, unit, less in MEASURES
    ]


def line(share: int, limit: int, name: str, runs: dict[str, list[Document]]) -> tuple[str, ...]:
    """One method's medians."""
    decode, prefill, first = (median_of(runs[name], key) for _, key, _, _ in MEASURES)
    base = median_of(runs[ON_DEMAND.name], "decode_tokens_per_s")
    return (
        f"{share} %",
        str(limit),
        name,
        f"{decode:.1f}",
        f"{decode / base:.2f}" if base else "",
        f"{prefill:.1f}",
        f"{first:.3f}",
        f"{median_of(runs[name], 'degraded_share'):.3f}",
        format_size(median_of(runs[name], "bytes_read_per_token")),
    )
