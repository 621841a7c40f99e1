"""A prepared decoding step against the same one as transformers runs it: `step`."""

import sys
from functools import partial

from benchmarks.child import in_turn, timed
from benchmarks.results import Report, compare, values
from benchmarks.setting import Setting

PROMISED = 5.0


def step(setting: Setting) -> Report:
    """What a decoding step costs beside its weights and experts, prepared against eager."""
    new_tokens = setting.counts(0, 48)["new_tokens"]
    words = [sys.executable, "-m", "benchmarks.step_child", str(setting.checkpoint.folder)]
    command = [*words, "--new-tokens", str(new_tokens)]
    turns = in_turn(setting.runs, {"ours": partial(timed, command)}, must="ours")
    runs = turns.runs["ours"]
    row = compare(
        ("step", "fixed cost of a layer and token", "us"),
        values(runs, "prepared_us"),
        "eager",
        values(runs, "eager_us"),
        less_is_better=True,
    ).promised(PROMISED)
    notes = sorted({note for run in runs for note in run["notes"]})
    return Report([row], [*notes, *turns.notes], turns.runs)
