"""Ours with what is shared against ours without: `batch` and `second-turn`."""

import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.child import in_turn, timed
from benchmarks.results import Document, Report, compare, values
from benchmarks.setting import Setting

from retinue.config import format_size

REQUESTS = 8
ADDED_TOKENS = 32  # what the second turn says


def batch(setting: Setting) -> Report:
    """Eight requests of different lengths together, against one at a time."""
    counts = setting.counts(64, 32)
    engines = {
        name: partial(timed, batch_command(setting, size, **counts))
        for name, size in (("ours", REQUESTS), ("one at a time", 1))
    }
    turns = in_turn(setting.runs, engines)
    together, single = turns.runs["ours"], turns.runs.get("one at a time")
    peaks, budgets = (values(together, key) for key in ("peak_rss_bytes", "budget_bytes"))
    rows = [
        compare(
            ("batch", "peak memory", "bytes"),
            peaks,
            "budget",
            budgets,
            less_is_better=True,
            ok=all(peak <= budget for peak, budget in zip(peaks, budgets, strict=True)),
        )
    ]
    notes = [_memory(together)]
    if single:
        notes.append(_equality(together, single))
        for key, what, unit, less in (
            ("answers_s", "prompts and answers", "s", True),
            ("decode_tokens_per_s", "decode", "tokens/s", False),
        ):
            other = values(single, key)
            title = ("batch", what, unit)
            row = compare(title, values(together, key), "one at a time", other, less_is_better=less)
            rows.insert(0, row)
    return Report(rows, [*notes, *turns.notes], turns.runs)


def batch_command(setting: Setting, size: int, *, prompt_tokens: int, new_tokens: int) -> list[str]:
    """What answers the eight requests, `size` of them at once."""
    words = ["--batch", str(size), "--requests", str(REQUESTS)]
    return _command(setting, "batch", prompt_tokens, new_tokens) + words


def _command(setting: Setting, work: str, prompt_tokens: int, new_tokens: int) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.sharing_child", work]
    words += [str(setting.checkpoint.folder), "--memory", str(setting.memory_bytes)]
    return [*words, "--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]


def _memory(runs: Sequence[Document]) -> str:
    peak, budget = max(values(runs, "peak_rss_bytes")), runs[0]["budget_bytes"]
    resident, total = runs[0]["resident_experts"], runs[0]["total_experts"]
    return (
        f"the highest peak was {format_size(peak)} of {format_size(budget)},"
        f" with {resident} of {total} experts resident"
    )


def _equality(together: Sequence[Document], single: Sequence[Document]) -> str:
    """In how many answers the two sides had the same tokens, and so the same work."""
    equal = min(
        sum(a == b for a, b in zip(mine["token_ids"], other["token_ids"], strict=True))
        for mine, other in zip(together, single, strict=True)
    )
    return f"{equal} of {REQUESTS} answers had the same tokens on both sides"


def second_turn(setting: Setting) -> Report:
    """A conversation's second turn up to its first token, against the first turn's."""
    counts = setting.counts(1000, 16)
    engines = {
        name: partial(timed, turns_command(setting, afresh=afresh, **counts))
        for name, afresh in (("ours", False), ("afresh", True))
    }
    turns = in_turn(setting.runs, engines)
    reusing, afresh = turns.runs["ours"], turns.runs.get("afresh")
    seconds = values(reusing, "second_turn_s")
    length = reusing[0]["second_prompt_tokens"]
    title = ("second-turn", f"first token, {length} tokens", "s")
    first = values(reusing, "first_turn_s")
    rows = [compare(title, seconds, "first turn", first, less_is_better=True)]
    if afresh:
        other = values(afresh, "second_turn_s")
        rows.append(compare(title, seconds, "computed afresh", other, less_is_better=True))
    reused = min(run["reused_tokens"] for run in reusing)
    notes = [f"{reused} of the second turn's {length} tokens were reused"]
    return Report(rows, [*notes, *turns.notes], turns.runs)


def turns_command(
    setting: Setting, *, afresh: bool, prompt_tokens: int, new_tokens: int
) -> list[str]:
    """What has the conversation; `afresh` computes all of its second turn."""
    words = ["--added-tokens", str(ADDED_TOKENS), *(["--afresh"] if afresh else [])]
    return _command(setting, "turns", prompt_tokens, new_tokens) + words
