"""Takes the memory of a model's experts before anything else, and before torch is imported.

New pages are not free: a virtual machine may need seconds for a gigabyte of them. They become
resident in a thread, while this process imports its libraries and builds the network.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from retinue.config import Config
from retinue.errors import UsageError
from retinue.memory.budget import Split, split
from retinue.memory.home import locate
from retinue.memory.tier import Tier
from retinue.model.survey import survey
from retinue.policy.base import Policies
from retinue.policy.presets import Preset, preset
from retinue.types import Facts


@dataclass(frozen=True, slots=True)
class Reserved:
    """What is decided from headers and settings alone, and the slots; `release` gives them back."""

    folder: Path
    config: Config
    facts: Facts
    preset: Preset
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
    policies = _policies(chosen, config)
    facts = survey(folder, config.precision)
    each_layer = policies.placement.fixed
    limits = split(facts, **config.room(), each_layer=each_layer, beside=beside)
    tier = Tier(limits.slots, limits.slot_bytes)
    tier.touch()
    seconds = time.perf_counter() - started
    return Reserved(folder, config, facts, chosen, policies, limits, tier, seconds, notes)


def _policies(chosen: Preset, config: Config) -> Policies:
    """The preset's policies, with the threshold of fetching that the user wants."""
    policies = chosen.build()
    if config.fetch_above is None:
        return policies
    if chosen.exact:
        raise UsageError(
            f"the preset `{chosen.name}` is exact, it replaces no missing expert:"
            f" `fetch_above` = {config.fetch_above:g}",
            hint="leave `--fetch-above` out, or use a preset that does, such as `popular-by-task`",
        )
    return replace(policies, fetch_above=config.fetch_above)
