"""AdapMoE's cache split: slots go to the layers where they save the most reads on demand.

AdapMoE (arXiv 2408.10284, section 4.3): sizes s_l with sum T minimise the sum of f_l(s_l), by
dynamic programming over layers, O(L T^2). For Mixtral (8 experts, top 2), with a the accuracy of
the prefetch, which brings one missing expert, and r the share of tokens that need but one,
f = r (1 - s/8)(1 - a) + (1 - r) [2 (8-s)(7-s)/56 (1-a) + (8-s)(7-s)/56 a + 2 (8-s)s/56 (1-a)].
That is the expected number of reads on demand where residents are as likely needed as others. So
in general, of E experts with j needed (p_j of the tokens) and m of them missing, m being
hypergeometric, a read ahead saves one of them with probability a:
f(s) = sum_j p_j sum_{m >= 1} h(m; E, E - s, j) (m - a) = sum_j p_j [j (E - s) / E - a (1 - h(0))].
"""

from math import comb

import numpy as np
import numpy.typing as npt

from retinue.policy.preset import Arrays, Given
from retinue.types import IntArray

Costs = npt.NDArray[np.float64]


def reads_on_demand(experts: int, accuracy: float, kept: npt.ArrayLike) -> Costs:
    """f(s) for s = 0 .. `experts`: [experts + 1].

    kept: [k], the share of tokens that need 1 .. k experts.
    """
    sizes = np.arange(experts + 1)
    total = np.zeros(experts + 1)
    for needed, share in enumerate(np.asarray(kept, dtype=np.float64).tolist(), start=1):
        ways = comb(experts, needed)
        all_there = np.array([comb(size, needed) / ways for size in sizes.tolist()])
        missing = needed * (experts - sizes) / experts
        total += share * (missing - accuracy * (1 - all_there))
    return total


def split_slots(costs: Costs, slots: int, least: int) -> IntArray:
    """Sizes [layers] of the least sum of `costs` [layers, experts + 1], at least `least` each.

    All of `slots` are given out, as far as there are experts. Fewer slots than `least` for each
    layer are given out evenly.
    """
    layers, most = costs.shape[0], costs.shape[1] - 1
    slots = min(slots, layers * most)
    least = min(least, most, slots // layers)
    best = np.full(slots + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((layers, slots + 1), dtype=np.int64)
    for layer in range(layers):
        found = np.full(slots + 1, np.inf)
        for size in range(least, most + 1):
            if size > slots:
                break
            candidate = np.full(slots + 1, np.inf)
            candidate[size:] = best[: slots + 1 - size] + costs[layer, size]
            better = candidate < found
            found[better], choices[layer, better] = candidate[better], size
        best = found
    sizes = np.zeros(layers, dtype=np.int64)
    left = slots
    for layer in reversed(range(layers)):
        sizes[layer] = choices[layer, left]
        left -= int(sizes[layer])
    return sizes


def expected_rooms(arrays: Arrays, given: Given) -> IntArray:
    """The split for a model: [layers], 0 where a layer has no experts.

    `accuracy` and `single` of the kind `adapmoe`: of the tokens that need one expert less than k.
    """
    rows = zip(arrays["accuracy"].tolist(), arrays["single"].tolist(), strict=True)
    costs = [reads_on_demand(given.experts, a, _kept(r, given.top_k)) for a, r in rows]
    rooms = np.zeros(given.layers, dtype=np.int64)
    rooms[list(given.routed)] = split_slots(np.array(costs), given.slots, given.top_k)
    return rooms


def _kept(single: float, top_k: int) -> Costs:
    """Shares of tokens that need 1 .. k experts: [k]."""
    kept = np.zeros(top_k)
    kept[-1] += 1 - single
    kept[max(top_k - 2, 0)] += single
    return kept
