"""Misses are divided by playing through a layer on three timelines, whoever is free first goes on.

HybriMoE (arXiv 2504.05897): the accelerator takes the cached expert with most tokens, the processor
the uncached one with fewest, the link the uncached one with most, which is cached once it is there;
the aim is the least max(processor, accelerator). Deviations: the link does not begin a read that
would end after the processor could have computed all that is left; and the processor, when it has
nothing to do, takes no cached experts over.
"""

from dataclasses import dataclass, field

import numpy as np

from retinue.policy.base import BoolArray, Costs, View
from retinue.policy.miss.fetch import heaviest_first
from retinue.types import Demand, IntArray


@dataclass(slots=True)
class Plan:
    """How a layer goes. Experts are places in what was asked."""

    seconds: float = 0.0  # when the last one is computed
    elsewhere: list[int] = field(default_factory=list)  # in order
    read: list[int] = field(default_factory=list)  # in order


def play(tokens: list[int], cached: list[bool], costs: Costs) -> Plan:
    """The layer's plan: tokens[i] chose expert i. `costs.elsewhere_s` is known."""
    assert costs.elsewhere_s is not None
    order = sorted(range(len(tokens)), key=lambda place: (-tokens[place], place))
    ready = [(0.0, tokens[place]) for place in order if cached[place]]
    missing = [place for place in order if not cached[place]]  # most tokens first
    plan, processor, link = Plan(), 0.0, 0.0
    left = sum(tokens[place] for place in missing)
    while missing:
        hottest, coldest = missing[0], missing[-1]
        worth = link + costs.read_s <= processor + left * costs.elsewhere_s
        if worth and link <= processor:
            link += costs.read_s
            ready.append((link, tokens[hottest]))
            plan.read.append(missing.pop(0))
            left -= tokens[hottest]
        else:
            processor += tokens[coldest] * costs.elsewhere_s
            plan.elsewhere.append(missing.pop())
            left -= tokens[coldest]
    accelerator = 0.0
    for when, count in ready:
        accelerator = max(accelerator, when) + count * costs.expert_s
    plan.seconds = max(processor, accelerator)
    return plan


class Timelines:
    """With one place that computes it is `FetchAll`."""

    exact = True

    def fetch(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """All experts of the demand that are not resident, those with most tokens first."""
        if view.costs is None or view.costs.elsewhere_s is None:
            return heaviest_first(demand, resident)
        missing, tokens = demand.experts[~resident], demand.tokens[~resident]
        return missing[np.argsort(-tokens, kind="stable")]

    def elsewhere(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """Those that the processor takes in the plan."""
        if view.costs is None or view.costs.elsewhere_s is None or resident.all():
            return demand.experts[:0]
        plan = play(demand.tokens.tolist(), resident.tolist(), view.costs)
        return np.sort(demand.experts[plan.elsewhere])
