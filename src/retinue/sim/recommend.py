"""Which preset and which division of the slots serve a recording best in one cell.

All that are exact, or all, are replayed as they are; the best few again with other rings. What
counts is the time until everything is served, prompts and answers, so each weighs as much as in the
recording. Another than the default is recommended only where that is sure: with the costs of each
of several runs it has to be ahead by more than replays err, and where both ran live, it has to have
been faster in every run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retinue.sim.candidates import Candidate
from retinue.sim.cells import ORACLE, Cell, Table
from retinue.sim.replay import Outcome
from retinue.sim.stage import Setting

DEFAULT = "auto"
RINGS = (0.1, 0.5, 1.0)  # besides each preset's own
FINALISTS = 3
WORTH = 0.01  # who gains less is not looked at
LEAST_RUNS = 3
# What replays err by, at most nine times in ten: docs/LOG.md, 2026-11-30.
DECODE_ERROR, PREFILL_ERROR = 0.15, 0.35
# How many times as fast as the default a preset was live, in each run that both had, with prompts
# and answers of so many tokens. Empty: they did not run here.
Live = Callable[[str, int, int], Sequence[float]]


def _never(preset: str, prefill_tokens: int, decode_tokens: int) -> Sequence[float]:
    return ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """How sure the costs of a cell are: the same cell with the costs of each run, and live runs."""

    runs: Sequence[Setting] = ()
    live: Live = _never


@dataclass(frozen=True, slots=True)
class Try:
    """One preset with one ring: how long the recording took."""

    preset: str
    ring: float | None
    seconds: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Advice:
    """Who is recommended, of `tries`, the fastest first.

    `margin`: how much longer the default took, as a share, 0 if it is the one. `why_not`: why it
    stays although others seem faster, each with its reason.
    """

    best: Try
    margin: float
    tries: tuple[Try, ...]
    why_not: tuple[str, ...] = ()


def advise(
    table: Table,
    candidates: Sequence[Candidate],
    cell: Cell,
    evidence: Evidence,
    advance: Callable[[], object] = lambda: None,
) -> Advice:
    """Try them in `cell`; the default is one of them."""
    able = {each.preset.name: each for each in candidates if each.preset.name != ORACLE}
    assert DEFAULT in able, "nothing to compare with"

    def replayed(name: str, ring: float | None, setting: Setting = cell.setting) -> Outcome:
        outcome = table.replay(able[name], setting, ring=ring)
        advance()
        return outcome

    tries = [_try(name, None, replayed(name, None)) for name in able]
    for one in sorted(tries, key=lambda one: one.seconds)[:FINALISTS]:
        if not able[one.preset].build(cell.setting.slots, None).placement.fixed:
            tries += [_try(one.preset, ring, replayed(one.preset, ring)) for ring in RINGS]
    ranked = tuple(sorted(tries, key=lambda one: one.seconds))
    plain = next(one for one in tries if (one.preset, one.ring) == (DEFAULT, None))
    first = {one.preset: one for one in reversed(ranked)}  # of each preset its best ring
    ahead = [one for one in ranked if plain.seconds > one.seconds * (1 + WORTH)]
    ahead = [one for one in ahead if one is first[one.preset]][:FINALISTS]
    bases = [replayed(DEFAULT, None, setting) for setting in evidence.runs if ahead]
    reasons: list[str] = []
    for one in ahead:
        others = [replayed(one.preset, one.ring, setting) for setting in evidence.runs]
        margin = plain.seconds / one.seconds - 1
        reason = _doubt(one, margin, list(zip(bases, others, strict=True)), evidence.live)
        if not reason:
            return Advice(one, margin, ranked, tuple(reasons))
        reasons.append(reason)
    return Advice(plain, 0.0, ranked, tuple(reasons))


def _try(preset: str, ring: float | None, outcome: Outcome) -> Try:
    decode = outcome.decode
    speed = decode.tokens / decode.seconds if decode.seconds else 0.0
    return Try(preset, ring, outcome.seconds, speed)


def _doubt(one: Try, margin: float, pairs: list[tuple[Outcome, Outcome]], live: Live) -> str:
    """Why `one` is not sure to be faster than the default; empty: it is.

    `pairs`: the default and it, with the costs of each run.
    """
    ring = "" if one.ring is None else f" with a ring of {one.ring:.0%}"
    name = f"`{one.preset}`{ring} is {margin:.0%} ahead"
    if len(pairs) < LEAST_RUNS:
        return f"{name} by costs of too few runs to tell presets apart ({len(pairs)})"
    base, gains = pairs[0][0], [base.seconds / other.seconds - 1 for base, other in pairs]
    spread = f"{min(gains):.0%} to {max(gains):.0%} with the costs of each run"
    if min(gains) <= WORTH:
        return f"{name}, but {spread}, so it is within their spread"
    error = _error(base)
    if min(gains) <= error:
        return f"{name} ({spread}), which is within what replays err ({error:.0%})"
    found = live(one.preset, base.prefill.tokens, base.decode.tokens)
    if found and min(found) <= 1:
        times = f"{min(found):.2f} to {max(found):.2f} times as fast as `{DEFAULT}`"
        return f"{name} ({spread}), but live it was {times}"
    return ""


def _error(outcome: Outcome) -> float:
    """What a replay errs by, as a share, for this share of prompts and answers."""
    decode_s, prefill_s = outcome.decode.seconds, outcome.prefill.seconds
    whole_s = decode_s + prefill_s
    return (decode_s * DECODE_ERROR + prefill_s * PREFILL_ERROR) / whole_s if whole_s else 0.0
