"""Which preset and which division of the slots serve a recording best in one cell.

All that are exact, or all, are replayed as they are; the best few again with other rings. What
counts is the time until everything is served, prompts and answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retinue.sim.candidates import Candidate
from retinue.sim.cells import ORACLE, Cell, Table

DEFAULT = "auto"
RINGS = (0.1, 0.5, 1.0)  # besides each preset's own
FINALISTS = 3
WORTH = 0.01  # a ring or a preset other than the default has to gain more


@dataclass(frozen=True, slots=True)
class Try:
    """One preset with one ring: how long the recording took."""

    preset: str
    ring: float | None
    seconds: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Advice:
    """The best of `tries`. `margin`: how much longer the default took, as a share; 0 if it won."""

    best: Try
    margin: float
    tries: tuple[Try, ...]


def advise(
    table: Table,
    candidates: Sequence[Candidate],
    cell: Cell,
    advance: Callable[[], object] = lambda: None,
) -> Advice:
    """Try them in `cell`."""
    able = [each for each in candidates if each.preset.name != ORACLE]
    assert able, "nobody to choose from"
    tries = [_try(table, each, cell, None, advance) for each in able]
    by_name = {each.preset.name: each for each in able}
    for one in sorted(tries, key=lambda one: one.seconds)[:FINALISTS]:
        candidate = by_name[one.preset]
        if not candidate.build(cell.setting.slots, None).placement.fixed:
            tries += [_try(table, candidate, cell, ring, advance) for ring in RINGS]
    ranked = sorted(tries, key=lambda one: one.seconds)
    plain = next((one for one in tries if (one.preset, one.ring) == (DEFAULT, None)), ranked[0])
    best = ranked[0] if plain.seconds > ranked[0].seconds * (1 + WORTH) else plain
    return Advice(best, plain.seconds / best.seconds - 1, tuple(ranked))


def _try(
    table: Table,
    candidate: Candidate,
    cell: Cell,
    ring: float | None,
    advance: Callable[[], object],
) -> Try:
    outcome = table.replay(candidate, cell.setting, ring=ring)
    advance()
    decode = outcome.decode
    speed = decode.tokens / decode.seconds if decode.seconds else 0.0
    return Try(candidate.preset.name, ring, outcome.seconds, speed)
