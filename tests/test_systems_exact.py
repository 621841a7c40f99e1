"""The parts of the exact systems: each rule against a case by hand from its paper's equation."""

import numpy as np
import pytest

from retinue.policy.base import Ahead
from retinue.policy.evict.quota import Quota
from retinue.policy.evict.recency import Recency
from retinue.policy.predict.stacked_gates import StackedGates
from test_policies import leaving, table, view

# --- mixtral-offloading: as many slots for each layer, the least recently used of them leaves


@pytest.mark.parametrize(
    ("held", "layer", "first"),
    [
        # Eight slots, four layers: two each. Layer 3 has three, so the oldest of them leaves,
        # though (0, 0) is older.
        ({(0, 0): 1, (0, 1): 8, (1, 0): 8, (3, 0): 7, (3, 1): 6, (3, 2): 8}, 1, (3, 1)),
        # Nobody is over: the layer that runs has its two, and gives for itself.
        ({(0, 0): 1, (0, 1): 2, (1, 0): 5, (1, 1): 6, (2, 0): 3, (3, 0): 4}, 1, (1, 0)),
        # It has one: there is room in its quota, so the oldest of all leaves.
        ({(0, 0): 1, (0, 1): 2, (1, 0): 5, (2, 0): 3, (2, 1): 3, (3, 0): 4}, 1, (0, 0)),
    ],
)
def test_a_layer_over_its_quota_gives_first(
    held: dict[tuple[int, int], int], layer: int, first: tuple[int, int]
) -> None:
    resident = table(dict.fromkeys(held, 1), 0, bool)
    facts = view(resident=resident, last_used=table(held, -1, np.int64), layer=layer)
    order = leaving(Quota(Recency()), sorted(held), facts)
    assert order[0] == first
    assert sorted(order) == sorted(held)


def test_quotas_of_one_s_own() -> None:
    held = {(0, 0): 1, (0, 1): 2, (0, 2): 3, (2, 0): 4, (2, 1): 5}
    facts = view(resident=table(held, 0, bool), last_used=table(held, -1, np.int64), layer=1)
    quota = Quota(Recency(), lambda facts: np.array([3, 2, 1, 2], np.float32))
    assert leaving(quota, sorted(held), facts) == [(2, 0), (2, 1), (0, 0), (0, 1), (0, 2)]


# --- stacked gates

ROUTERS = (
    Ahead(2, np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], np.float32)),
    Ahead(3, np.array([[0.0, 0.0, 0.0, 0.1, 0.2, 0.7]], np.float32)),
)


def wanted(gates: StackedGates, **facts: object) -> list[tuple[int, list[int]]]:
    found = gates.forecast(view(ahead=ROUTERS, **facts))
    return [(want.layer, want.experts.tolist()) for want in found]


def test_stacked_gates_look_as_far_as_they_are_asked() -> None:
    assert wanted(StackedGates(2)) == [(2, [1, 3]), (3, [5, 4])]
    assert wanted(StackedGates(2, 1)) == [(2, [1]), (3, [5])]
    assert wanted(StackedGates(2), top_k=3) == [(2, [1, 3, 0]), (3, [5, 4, 3])]


@pytest.mark.parametrize(
    ("resident", "layers"), [({}, [2]), ({(2, 1)}, [2]), ({(2, 1), (2, 3)}, [2, 3])]
)
def test_stacked_gates_stop_where_something_is_missing(resident: set, layers: list) -> None:
    there = table(dict.fromkeys(resident, 1), 0, bool)
    found = wanted(StackedGates(2, until_missing=True), resident=there)
    assert [layer for layer, _ in found] == layers


def test_stacked_gates_skip_a_layer_without_scores() -> None:
    facts = view(ahead=(Ahead(2), ROUTERS[1]))
    assert [want.layer for want in StackedGates(2).forecast(facts)] == [3]
    assert StackedGates(3).depth == 3
