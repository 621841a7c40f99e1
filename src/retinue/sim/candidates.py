"""Which presets a trace can replay, and why not the others.

A preset needs the signals that its policies look at, what was learnt of the model, and the sizes of
experts. Whoever calls finds out what is known of the model: this module reads no file.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from retinue.errors import Refused
from retinue.memory.base import Sizes
from retinue.policy.evict.belady import Future, future_of
from retinue.policy.policies import Policies
from retinue.policy.predict.forecasters import forecaster
from retinue.policy.predict.learned import Learned
from retinue.policy.preset import Given, Preset
from retinue.policy.presets import PRESETS, preset
from retinue.sim.fixed import Beforehand
from retinue.trace import TraceHead, answers

# Of one weight in the nested store, scales included.
NESTED_BITS = {"int8": 8.5, "int4": 4.5, "int2": 2.5}
RECORDED = (
    "replayed with the recorded scores: other experts serve than in the trace, and the routing of"
    " what follows is taken as if they had not"
)
NEAR = "asks routers for more than the trace has, which lacks {}"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the model for one preset; `learned` is for forecasters that are."""

    given: Given
    learned: Learned | None = None

    def beforehand(self, policies: Policies) -> Beforehand:
        """What the preset's placement goes by. Raises Refused for a forecaster without a network.

        A placement that needs a profile has one.
        """
        if not policies.placement.needs_profile:
            return Beforehand()
        profile = self.given.known()
        if not policies.placement.periodic:
            return Beforehand(profile)
        return Beforehand(profile, forecaster(policies.forecaster, profile, self.learned))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A preset that can be replayed. `build` makes its policies anew; `notes` say what to know."""

    preset: Preset
    known: Callable[[int], Known]  # with room for so many experts
    needs: frozenset[str]
    notes: tuple[str, ...] = ()

    def build(self, slots: int, future: Future | None) -> Policies:
        """Fresh policies; `future` is for those that know it."""
        return self.preset.build(replace(self.known(slots).given, slots=slots, future=future))


def candidates(
    presets: Iterable[Preset],
    head: TraceHead,
    known: Callable[[Preset, int], Known],
    *,
    timed: bool,
) -> tuple[list[Candidate], dict[str, str]]:
    """Those that the trace of `head` can replay, and of the others why not, and what would help.

    `known(preset, slots)` may raise Refused. `timed`: requests arrive at times.
    """
    found: list[Candidate] = []
    reasons: dict[str, str] = {}
    for row in presets:
        try:
            found.append(_candidate(row, head, known, timed=timed))
        except Refused as error:
            reasons[row.name] = f"{error}; {error.hint}" if error.hint else str(error)
    return found, reasons


def _candidate(
    row: Preset, head: TraceHead, known: Callable[[Preset, int], Known], *, timed: bool
) -> Candidate:
    if row.replayed and timed:
        raise Refused("what comes next depends on the speed where requests arrive at times")
    nothing = future_of([], head.layers, head.experts) if row.replayed else None
    whole = head.layers * head.experts
    given = replace(known(row, whole).given, slots=whole, future=nothing)
    policies = row.build(given)
    known(row, whole).beforehand(policies)
    needs = policies.needs
    if not policies.routing.exact:
        needs |= {"scores"}
    if missing := sorted(needs - set(head.signals)):
        raise Refused(f"needs a trace with {' and '.join(f'`{name}`' for name in missing)}")
    notes = [] if row.exact else [RECORDED]
    asked = answers(policies.asks_ahead, own=policies.checking is not None)
    if lacking := [name for name in asked if name not in head.signals]:
        notes.append(NEAR.format(" and ".join(f"`{name}`" for name in lacking)))
    needs |= set(asked) & set(head.signals)
    return Candidate(row, lambda slots: known(row, slots), frozenset(needs), tuple(notes))


def sizes_of(head: TraceHead, names: Iterable[str], read_bytes: int) -> Sizes:
    """Sizes of the model's experts, all alike, in the precisions `names`; the first is its own."""
    there = np.zeros((head.layers, head.experts), dtype=np.int64)
    there[list(head.routed)] = 1
    width = {"float32": 32, "int8": 8.5, "int4": 4.5}
    own = 16.0
    if head.facts is not None:
        own = width.get(head.facts.stored or head.facts.dtype, 16.0)
    shares = [NESTED_BITS.get(name, own) / own for name in names]
    sizes = np.stack([there * int(read_bytes * share) for share in shares])
    return Sizes(sizes, sizes)


def chosen(names: str | None) -> list[Preset]:
    """Those that `names`, with commas between, asks for; without it all. Raises UsageError."""
    if names is None:
        return list(PRESETS.values())
    found = {found.name: found for found in map(preset, map(str.strip, names.split(",")))}
    return list(found.values())
