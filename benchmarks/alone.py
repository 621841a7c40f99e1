"""Ours against what the machine allows: `bound`, `prefill`, `first-token` and `slots`."""

import itertools
import random
from functools import partial

from benchmarks import ours
from benchmarks.child import in_turn
from benchmarks.results import Document, Report, compare, not_slower, values
from benchmarks.setting import Setting, fits_comfortably

FIRST_TOKEN_PROMPT = 16
# Reading is not all: weights are converted and copied, and a short prompt is computed.
FIRST_TOKEN_ALLOWANCE = 1.35
SHARES = ("13%", "25%", "50%", "75%", "100%")


def bound(setting: Setting) -> Report:
    """Decode at the given memory against the machine's bound for the same reads."""
    counts = setting.counts(64, 32)
    command = ours.bench_command(setting.checkpoint.folder, memory=setting.memory_bytes, **counts)
    runs = in_turn(setting.runs, {"ours": partial(ours.bench, command)}).runs
    row = compare(
        ("bound", "decode", "tokens/s"),
        values(runs["ours"], "decode_tokens_per_s"),
        "bound",
        values(runs["ours"], "bound_tokens_per_s"),
    )
    return Report([row], [], runs)


def prefill(setting: Setting) -> Report:
    """A cold prompt against reading every expert once at the disk's measured speed."""
    checkpoint = setting.checkpoint
    counts = setting.counts(512, 0) | {"new_tokens": 0}
    command = ours.bench_command(checkpoint.folder, memory=setting.memory_bytes, **counts)
    runs = in_turn(setting.runs, {"ours": partial(ours.bench, command)}).runs
    for document in runs["ours"]:
        document["read_all_s"] = checkpoint.expert_bytes / document["disk_bytes_per_s"]
    row = compare(
        ("prefill", f"{counts['prompt_tokens']} tokens, cold", "s"),
        values(runs["ours"], "prefill_s"),
        "reading all experts",
        values(runs["ours"], "read_all_s"),
        less_is_better=True,
    )
    least = min(values(runs["ours"], "prefill_bytes_read")) / checkpoint.expert_bytes
    notes = [f"the prompt had {least:.0%} of all expert bytes read"] if least < 0.99 else []
    return Report([row], notes, runs)


def first_token(setting: Setting) -> Report:
    """A whole process up to its first token, against its imports and its reads."""
    checkpoint = setting.checkpoint
    source = random.Random(0)
    # Ids that every vocabulary has, and none of the special ones at its start.
    ids = [source.randrange(10, 100) for _ in range(FIRST_TOKEN_PROMPT)]
    command = ours.first_token_command(checkpoint, ids, memory=setting.memory_bytes)
    engines = {
        "ours": partial(ours.first_token, command, checkpoint),
        "imports": partial(ours.imports, checkpoint.family),
    }
    turns = in_turn(setting.runs, engines)
    if "imports" not in turns.runs:
        return Report([], turns.notes, turns.runs)
    pairs = zip(turns.runs["ours"], turns.runs["imports"], strict=True)
    row = compare(
        ("first-token", f"{FIRST_TOKEN_PROMPT} tokens, whole process", "s"),
        values(turns.runs["ours"], "wall_s"),
        "imports and reads",
        [_allowed_s(document, imports) for document, imports in pairs],
        less_is_better=True,
    )
    return Report([row], turns.notes, turns.runs)


def plan(setting: Setting) -> Report:
    """What `plan` predicts, from speeds measured just before, and what `bench` then measures."""
    folder, counts = setting.checkpoint.folder, setting.counts(512, 32)
    command = ours.bench_command(folder, memory=setting.memory_bytes, **counts)
    tokens = counts["prompt_tokens"] + counts["new_tokens"] + 1

    def both() -> Document:
        predicted = ours.plan(folder, tokens=tokens, memory=setting.memory_bytes)
        return ours.bench(command) | {"predicted": predicted}

    runs = in_turn(setting.runs, {"ours": both}).runs
    rows = []
    for what in ("prefill", "decode"):
        key = f"{what}_tokens_per_s"
        measured = values(runs["ours"], key)
        for end, less in (("low", False), ("high", True)):
            ends = [float(run["predicted"][key][end]) for run in runs["ours"]]
            title = ("plan", what, "tokens/s")
            row = compare(title, measured, f"{end} end", ends, less_is_better=less)
            rows.append(row.promised(1.0))
    return Report(rows, [], runs)


def _allowed_s(document: Document, imports: Document) -> float:
    """Seconds for the imports and, with the allowance, for what was read."""
    read_s = document["bytes_read"] / document["disk_bytes_per_s"]
    allowed: float = imports["wall_s"] + FIRST_TOKEN_ALLOWANCE * read_s
    return allowed


def slots(setting: Setting) -> Report:
    """Decode at rising shares of resident experts: more memory must never be slower."""
    given = setting.checkpoint
    # Its largest share has all experts, which a large checkpoint has no room for.
    checkpoint = given if fits_comfortably(given) else setting.small()
    counts = setting.counts(64, 64)
    engines = {
        share: partial(ours.bench, ours.bench_command(checkpoint.folder, experts=share, **counts))
        for share in SHARES
    }
    turns = in_turn(setting.runs, engines, must=SHARES[0])
    speeds = {
        share: values(runs, "decode_tokens_per_s") for share, runs in turns.runs.items() if runs
    }
    rows = []
    measured = list(speeds)
    for fewer, more in itertools.pairwise(measured):
        rows.append(
            compare(
                ("slots", f"decode at {more}", "tokens/s"),
                speeds[more],
                f"at {fewer}",
                speeds[fewer],
                ok=not_slower(speeds[fewer], speeds[more]),
            )
        )
    notes = [] if checkpoint is given else [f"measured with {checkpoint.name}"]
    return Report(rows, [*notes, *turns.notes], turns.runs)
