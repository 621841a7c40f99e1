"""Takes the memory of a model's experts before anything else, and before torch is imported.

New pages are not free: a virtual machine may need seconds for a gigabyte of them. They become
resident in threads, while this process imports its libraries and builds the network.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from retinue.config import Config
from retinue.errors import RetinueError, Unsupported, UsageError
from retinue.memory.budget import Split, nested_bytes, split
from retinue.memory.home import called, locate
from retinue.memory.machine import cores, machine_name, remembered_speeds
from retinue.memory.tier import Tier
from retinue.model.predictors import find_predictor
from retinue.model.profiles import find_profile
from retinue.model.survey import survey
from retinue.policy.policies import Policies
from retinue.policy.preset import Given, Preset
from retinue.policy.presets import preset
from retinue.policy.recommended import Recommendation, best_for
from retinue.types import Facts

AUTO = "auto"
TOUCHERS = 4  # threads at most that make pages resident
SHORTER = 4  # what part of the usual context is proposed where that
MANY = 1.25  # gives room for so many times the experts


@dataclass(frozen=True, slots=True)
class Reserved:
    """What is decided from headers and settings alone, and the slots; `release` gives them back."""

    folder: Path
    config: Config
    facts: Facts
    preset: Preset
    given: Given
    policies: Policies
    split: Split
    tier: Tier
    seconds: float  # that this took
    notes: list[str]

    def release(self) -> None:
        """Give the slots' memory back. Idempotent."""
        self.tier.release()


def reserve(model: str | Path, config: Config, beside: int = 0) -> Reserved:
    """Find `model` and take the slots that `config` leaves. Refuses what cannot fit.

    beside: bytes of the budget that the caller needs for itself.
    """
    started = time.perf_counter()
    notes: list[str] = []
    folder = locate(model, notes.append)
    chosen = preset(config.preset)
    facts = survey(folder, config.precision)
    limits = limits_of(facts, chosen, config, beside)
    given = given_of(folder, facts, limits.slots, chosen, config)
    policies = policies_of(chosen, config, given)
    if config.preset == AUTO:
        better = _recommended(folder, facts, limits.slots, config, notes)
        chosen, given, policies = better or (chosen, given, policies)
    lends = policies.exact and not policies.placement.fixed and sys.platform == "linux"
    more = limits.more if lends else 0
    if not more:
        notes += _context_notes(facts, chosen, config, limits, beside)
    tier = Tier(limits.slots, limits.slot_bytes, more)
    tier.touch(min(TOUCHERS, cores()))
    seconds = time.perf_counter() - started
    return Reserved(folder, config, facts, chosen, given, policies, limits, tier, seconds, notes)


def _context_notes(
    facts: Facts, chosen: Preset, config: Config, limits: Split, beside: int
) -> list[str]:
    """That a context which nobody asked for takes the room of many experts, if it does.

    Where slots are lent it does so only while it is used.
    """
    if config.context is not None or limits.slots == facts.total_experts:
        return []
    shorter = limits.context // SHORTER
    slots = limits_of(facts, chosen, replace(config, context=shorter), beside).slots
    if slots < MANY * limits.slots:
        return []
    return [
        f"there is room for contexts of {limits.context} tokens; with `--context {shorter}` there"
        f" would be room for {slots} experts instead of {limits.slots}"
    ]


def limits_of(facts: Facts, chosen: Preset, config: Config, beside: int = 0) -> Split:
    """How `config` divides the budget under a preset. Raises DoesNotFit."""
    if chosen.nested:
        beside += nested_bytes(facts.slot_bytes)
    return split(facts, **config.room(), each_layer=chosen.fixed, beside=beside)


def _recommended(
    folder: Path, facts: Facts, slots: int, config: Config, notes: list[str]
) -> tuple[Preset, Given, Policies] | None:
    """What `auto` stands for here, by what `retinue simulate --recommend` found; None: itself.

    An exact preset, for about this room and disk, on this machine. `notes` say so, or why not.
    """
    best = _best(folder, facts, slots, config)
    if best is None or (best.preset, best.ring) == (AUTO, None):
        return None
    try:
        chosen = preset(best.preset)
        if not chosen.exact or chosen.fixed or chosen.replayed:
            raise Unsupported("it is approximate, or for replays alone")
        given = given_of(folder, facts, slots, chosen, config)
        policies = replace(policies_of(chosen, config, given), ring=best.ring)
    except RetinueError as error:
        notes.append(f"auto: `{best.preset}` is recommended for this machine, but: {error}")
        return None
    notes.append(f"auto is `{best.preset}` here: {best.margin:.0%} faster in `retinue simulate`")
    return chosen, given, policies


def _best(folder: Path, facts: Facts, slots: int, config: Config) -> Recommendation | None:
    """What the profile recommends for so many slots; None without a word of it.

    Raises UsageError for a profile that is given and damaged.
    """
    try:
        known = find_profile(folder, facts, config.profile).recommended
    except (Unsupported, UsageError):
        if config.profile is not None:
            raise
        return None
    speeds = remembered_speeds(folder) if known else None
    disk = config.read_bytes_per_s or (speeds.disk_bytes_per_s if speeds is not None else None)
    if disk is None or slots >= facts.total_experts:
        return None
    return best_for(known, slots / facts.total_experts, disk, machine_name())


def given_of(folder: Path, facts: Facts, slots: int, chosen: Preset, config: Config) -> Given:
    """What is known of a model for one preset, if it needs any of it.

    Raises Refused where there is no profile that it needs, UsageError for one, or for something
    learnt, that is damaged. What was not learnt is refused by `Given.arrays`.
    """
    learned = find_predictor(folder, facts) if chosen.kinds else None
    return Given(
        facts.name,
        facts.layers,
        facts.experts_per_layer,
        facts.top_k,
        facts.routed,
        slots=slots,
        profile=find_profile(folder, facts, config.profile) if chosen.profiled else None,
        learned={} if learned is None else learned.arrays(chosen.kinds),
        place=called(folder),
    )


def policies_of(chosen: Preset, config: Config, given: Given) -> Policies:
    """The preset's policies, with the threshold of fetching that the user wants."""
    policies = chosen.build(given)
    if chosen.exact and not policies.exact:
        raise UsageError(
            f"the preset `{chosen.name}` says that it is exact, but its parts are not",
            hint="write `exact=False` in its row",
        )
    if config.fetch_above is None:
        return policies
    if not policies.routing.restricts:
        reason = (
            "is exact, it replaces no missing expert" if chosen.exact else "has no set that serves"
        )
        raise UsageError(
            f"the preset `{chosen.name}` {reason}: `fetch_above` = {config.fetch_above:g}",
            hint="leave `--fetch-above` out, or use a preset that does, such as `popular-by-task`",
        )
    return replace(policies, fetch_above=config.fetch_above)
