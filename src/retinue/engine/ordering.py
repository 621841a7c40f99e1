"""The order of a loaded model: its estimate begins with what the profile measured on this machine.

Without a profile it learns from what runs; until then it is first come, first served.
"""

from retinue.config import Config
from retinue.memory.cache import ExpertCache
from retinue.memory.machine import machine_name
from retinue.policy.costs import CostModel, Lengths
from retinue.policy.order.base import Order
from retinue.policy.order.estimate import Estimate, Loads
from retinue.policy.order.named import order_named
from retinue.policy.policies import Policies
from retinue.policy.profile import Profile
from retinue.types import Facts


def order_of(
    config: Config, facts: Facts, known: Profile | None, policies: Policies, cache: ExpertCache
) -> Order:
    """The order that `config` names, or else the preset, or else the default.

    Raises UsageError for one that the preset cannot serve.
    """
    name, placement = config.order or policies.order or "emoe", policies.placement
    if known is None:
        return order_named(name, Estimate(expert_bytes=facts.read_bytes), policies.paths)
    costs = CostModel()
    if known.costs is not None and known.costs.machine == machine_name():
        costs.take_over(known.costs)

    def length(task: str | None) -> float | None:
        found = known.output_tokens(task)
        return None if found is None else found.mean

    changes = placement.by_task or not placement.fixed
    loads = missing(known, cache) if changes else None
    estimate = Estimate(costs, Lengths(length), loads, facts.read_bytes)
    return order_named(name, estimate, policies.paths)


def missing(known: Profile, cache: ExpertCache) -> Loads:
    """How many of the experts that a task uses more than others do are not in memory."""

    def count(task: str | None) -> int:
        wanted = known.shares(task) > 1 / known.experts
        return int((wanted & (cache.slot_of < 0)).sum())

    return count
