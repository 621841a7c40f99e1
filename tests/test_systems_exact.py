"""The parts of the exact systems: each rule against a case by hand from its paper's equation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import routes
from disk import STEADY, ids
from retinue.policy.base import Ahead, Costs, MissHandler
from retinue.policy.evict.popularity import ByPopularity
from retinue.policy.evict.quota import Quota
from retinue.policy.evict.recency import Recency
from retinue.policy.evict.ring import Ring
from retinue.policy.miss.cheaper import CheaperPlace
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.miss.split import SplitMisses, reads
from retinue.policy.miss.timelines import Timelines, play
from retinue.policy.predict.correlation import Correlation, follows
from retinue.policy.predict.stacked_gates import StackedGates
from retinue.policy.predict.whole_layer import WholeLayer
from retinue.policy.presets import PRESETS
from retinue.types import Demand
from test_policies import EXPERTS, leaving, table, view

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


# --- se-moe: a ring of layers


def test_the_layer_that_ran_leaves_first() -> None:
    # Of four layers 1 runs: 2 is due next, then 3, then 0, and 1 again last.
    entries = [(0, 2), (1, 3), (1, 0), (2, 5), (3, 1)]
    used = table({(1, 3): 9, (1, 0): 8, (2, 5): 1}, -1, np.int64)
    order = leaving(Ring(), entries, view(layer=1, last_used=used))
    assert order == [(1, 0), (1, 3), (0, 2), (3, 1), (2, 5)]


@pytest.mark.parametrize(("slots", "depth"), [(6, 1), (12, 1), (18, 2), (24, 3), (99, 3), (2, 1)])
def test_se_moe_looks_as_many_layers_ahead_as_there_is_room_for(slots: int, depth: int) -> None:
    assert PRESETS["se-moe"].build(replace(routes.GIVEN, slots=slots)).predictor.depth == depth


def test_whole_layers_in_one_phase() -> None:
    ahead = (Ahead(2), Ahead(3))
    both = WholeLayer(2).forecast(view(ahead=ahead))
    assert [(want.layer, want.experts.tolist()) for want in both] == [
        (2, [0, 1, 2, 3, 4, 5]),
        (3, [0, 1, 2, 3, 4, 5]),
    ]
    stream = WholeLayer(1, "prefill")
    assert [want.layer for want in stream.forecast(view(ahead=ahead[:1], phase="prefill"))] == [2]
    assert stream.forecast(view(ahead=ahead[:1], phase="decode")) == []


# --- klotski: hot experts by a table of pairs


def test_the_table_of_pairs() -> None:
    table = follows(routes.profile())
    assert table[0, 1].tolist() == [0, 0, 0.75, 0, 0.25, 0]
    assert table[0, 3].tolist() == [0, 0, 0, 0, 1, 0]
    assert not table[0, 0].any()


@pytest.mark.parametrize(
    ("needed", "tokens", "hot", "heat"),
    [
        # 3/4 and 1/4 of expert 1's two tokens; expert 3's only one follows to 4.
        ([1, 3], [2, 1], [2, 4], [1.5, 1.5]),
        ([1, 3], [1, 1], [4, 2], [1.25, 0.75]),
        ([1], [1], [2, 4], [0.75, 0.25]),
        ([0, 5], [1, 1], [], []),
    ],
)
def test_klotski_reads_what_often_follows(
    needed: list[int], tokens: list[int], hot: list[int], heat: list[float]
) -> None:
    table = Correlation(routes.profile())
    table.observe(Demand(0, ids(*needed), ids(*tokens), np.ones(len(needed), np.float32)), view())
    wants = table.forecast(view(layer=0, ahead=(Ahead(1),)))
    assert [(want.layer, want.experts.tolist()) for want in wants] == [(1, hot)] * bool(hot)
    assert [want.scores.tolist() for want in wants] == [heat] * bool(hot)
    assert table.forecast(view(layer=1, ahead=(Ahead(2),))) == [], "of another layer"


# --- fiddler: a set by popularity, and the cheaper place


def test_fiddler_keeps_the_popular() -> None:
    # Shares of 21: 6, 1, 2, 5, 3, 4 in each layer.
    entries = [(0, 0), (1, 1), (0, 3), (2, 2), (3, 5)]
    used = table({(1, 1): 9}, -1, np.int64)
    order = leaving(ByPopularity(routes.profile()), entries, view(last_used=used))
    assert order == [(1, 1), (2, 2), (3, 5), (0, 3), (0, 0)]


HERE = Costs(read_s=0.070, expert_s=0.001, layer_s=0.002)
BESIDE = replace(HERE, elsewhere_s=0.007)  # the constants of Fiddler's code


def demanded(*tokens: int) -> Demand:
    """Experts 0, 1, ... of layer 1, by so many tokens each."""
    count = np.array(tokens, dtype=np.int64)
    return Demand(1, np.arange(len(tokens)), count, count.astype(np.float32))


def test_fiddler_computes_where_that_is_cheaper() -> None:
    # Nine tokens take 63 ms, ten as long as the copy of 70 ms.
    demand, resident = demanded(1, 9, 10, 30, 2), np.array([False, False, False, False, True])
    assert CheaperPlace().elsewhere(demand, resident, view(costs=BESIDE)).tolist() == [0, 1]
    assert CheaperPlace().fetch(demand, resident, view(costs=BESIDE)).tolist() == [3, 2, 1, 0]


# --- freetoken: misses divided by rates


@pytest.mark.parametrize(
    ("misses", "share", "count"),
    [
        # q = 1/4: of 4 misses floor(1) or 2. max(1 * 3/4, 3 * 1/4) = 3/4; with 2: max(6/4, 2/4).
        (4, 0.25, 1),
        # Of 3: 0 gives max(0, 3/4); 1 gives max(3/4, 2/4), as much: the fewer.
        (3, 0.25, 0),
        # Of 6: 1 gives max(3/4, 5/4); 2 gives max(6/4, 1).
        (6, 0.25, 1),
        # Of 7: 1 gives max(3/4, 6/4); 2 gives max(6/4, 5/4), as much: the fewer.
        (7, 0.25, 1),
        (8, 0.25, 2),
        (1, 0.45, 0),
        (2, 0.45, 1),
    ],
)
def test_freetoken_reads_as_many_as_end_together(misses: int, share: float, count: int) -> None:
    assert reads(misses, share) == count


def test_freetoken_reads_those_used_last() -> None:
    # Rates 1/6 and 1/2 of an expert a second: q = 1/4, so one of four is read.
    costs = replace(HERE, read_s=6.0, elsewhere_s=2.0)
    used = table({(1, 0): 5, (1, 1): 7, (1, 3): 2}, -1, np.int64)
    facts = view(costs=costs, last_used=used)
    resident = np.array([False, False, True, False, False])
    split, demand = SplitMisses(), demanded(1, 1, 1, 1, 1)
    assert split.elsewhere(demand, resident, facts).tolist() == [0, 3, 4]
    # A second place that is not twice as fast as the link is not worth it.
    assert not len(
        split.elsewhere(demand, resident, replace(facts, costs=replace(costs, elsewhere_s=3.0)))
    )


# --- hybrimoe: three timelines


def test_hybrimoe_plays_through_a_layer() -> None:
    # A read takes 4, a token 1 on the accelerator and 3 on the processor. Cached: two tokens.
    # Uncached, by tokens: 3, 2, 1, 1. The link takes the 3 (until 4), the processor a 1 (until 3),
    # then the other 1 (until 6); the link the 2 (until 8), which the processor would have at 12.
    costs = Costs(read_s=4.0, expert_s=1.0, layer_s=0.0, elsewhere_s=3.0)
    plan = play([2, 3, 2, 1, 1], [True, False, False, False, False], costs)
    assert plan.read == [1, 2]
    assert plan.elsewhere == [4, 3]
    # The accelerator: 2 until 2, waits for 4, 3 until 7, waits for 8, 2 until 10.
    assert plan.seconds == 10.0


def test_hybrimoe_leaves_to_the_processor_what_a_read_would_only_delay() -> None:
    costs = Costs(read_s=4.0, expert_s=1.0, layer_s=0.0, elsewhere_s=1.0)
    plan = play([1, 1, 1], [False, False, False], costs)
    assert (plan.read, plan.elsewhere, plan.seconds) == ([], [2, 1, 0], 3.0)


def test_hybrimoe_divides_misses_by_the_plan() -> None:
    costs = Costs(read_s=4.0, expert_s=1.0, layer_s=0.0, elsewhere_s=3.0)
    demand, resident = demanded(2, 3, 2, 1, 1), np.array([True, False, False, False, False])
    facts = view(costs=costs)
    assert Timelines().elsewhere(demand, resident, facts).tolist() == [3, 4]
    assert Timelines().fetch(demand, resident, facts).tolist() == [1, 2, 3, 4]
    assert not len(Timelines().elsewhere(demand, np.ones(5, dtype=bool), facts))


@pytest.mark.parametrize("miss", [CheaperPlace(), SplitMisses(), Timelines()])
@pytest.mark.parametrize("costs", [None, HERE])
def test_one_place_reads_every_miss(miss: MissHandler, costs: Costs | None) -> None:
    demand, resident = demanded(1, 5, 2, 2), np.array([False, False, True, False])
    facts = view(costs=costs)
    assert miss.exact
    assert not len(miss.elsewhere(demand, resident, facts))
    wanted = FetchAll().fetch(demand, resident, facts)
    assert miss.fetch(demand, resident, facts).tolist() == wanted.tolist() == [1, 3, 0]


@STEADY
@given(st.data())
def test_misses_are_divided_without_loss(data: st.DataObject) -> None:
    """Whatever the costs: what runs elsewhere is a miss, and what is read is all the rest."""
    count = data.draw(st.integers(1, EXPERTS))
    tokens = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    resident = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    seconds = st.floats(1e-6, 10.0)
    costs = Costs(data.draw(seconds), data.draw(seconds), 0.0, data.draw(seconds))
    demand, facts = demanded(*tokens), view(costs=costs)
    for miss in (CheaperPlace(), SplitMisses(), Timelines()):
        away = miss.elsewhere(demand, resident, facts)
        assert set(away.tolist()) <= set(np.flatnonzero(~resident).tolist())
        there = resident | np.isin(demand.experts, away)
        read = miss.fetch(demand, there, facts)
        assert sorted(read.tolist()) == np.flatnonzero(~there).tolist()
