"""Live decoding on a slower disk against what a replay predicts for it: `replays`."""

import sys
from dataclasses import replace
from functools import partial

from benchmarks.child import in_turn, timed
from benchmarks.results import Report, Row, compare, values
from benchmarks.setting import Setting

PRESETS = ("on-demand", "auto")
LIMITS = ((300, 100), (100, 300))  # MB/s: times are from the first, the prediction for the second
WITHIN = 0.15


def replays(setting: Setting) -> Report:
    """Decoding speed on one disk against a replay's, whose times are from another disk."""
    words = [sys.executable, "-m", "benchmarks.replays_child", str(setting.model)]
    report = Report()
    for known, other in LIMITS:
        limits = ["--read-limits", str(known), str(other)]
        engines = {name: partial(timed, [*words, "--preset", name, *limits]) for name in PRESETS}
        turns = in_turn(setting.runs, engines, must=PRESETS[0])
        for name, runs in turns.runs.items():
            row = compare(
                ("replays", f"{name}, {other} MB/s, predicted", "tokens/s"),
                values(runs, "predicted_tokens_per_s"),
                "measured",
                values(runs, "measured_tokens_per_s"),
            )
            report.rows.append(_within(row))
            report.runs[f"{name}, {other} MB/s"] = runs
        report.notes += turns.notes
    return report


def _within(row: Row) -> Row:
    """Whether the prediction is near enough."""
    return replace(row, ok=abs(row.ratio - 1) <= WITHIN)
