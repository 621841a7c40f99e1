"""Rules of approximate systems, each against a case computed by hand from its paper's equation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disk import STEADY, ids
from retinue.policy.base import Ahead, Prompt, Thinning, View
from retinue.policy.miss.hottest import FetchHottest
from retinue.policy.precision.by_expert import ByExpert
from retinue.policy.precision.by_share import ByShare
from retinue.policy.precision.by_token import ByToken
from retinue.policy.predict.chosen import Chosen
from retinue.policy.predict.path_dictionary import PathDictionary
from retinue.policy.predict.trail import Trail
from retinue.policy.ranks import before, shares
from retinue.policy.route.best_resident import BestResident
from retinue.policy.route.cache_prior import CachePrior
from retinue.policy.route.periodic_set import OutsideFirst, PeriodicSet, SetAhead
from retinue.policy.route.pre_gate import PreGate
from retinue.policy.route.whole_path import WholePath
from retinue.policy.systems.approximate import PRESETS
from retinue.policy.thin.calibrated import CalibratedTail
from retinue.policy.thin.missing_tail import MissingTail
from retinue.policy.thin.sensitivity import AdaptiveGate
from retinue.types import Demand, Want
from routes import (
    EXPERTS,
    GIVEN,
    HIDDEN,
    LAYERS,
    best,
    choice,
    demand,
    floats,
    learned,
    route,
    there,
    view,
)

ARRAYS = learned()
ROUTED = GIVEN.routed


# --- ranks


def test_what_ranks_above() -> None:
    part = shares(ids(3, 1, 9, 0)[None], floats([[0.2, 0.5, 7.0, 0.3]]), EXPERTS)
    assert part[0].tolist() == pytest.approx([0.2, 0.5, 0, 0.3])
    assert before(part)[0].tolist() == pytest.approx([0.8, 0, 1, 0.5])


@pytest.mark.parametrize(
    ("weights", "above"),
    [([0.5, 0.5], [0, 0.5]), ([0.0, 0.0], [0, 0]), ([3.0, 1.0], [0, 0.75])],
)
def test_ranks_of_ties_and_of_nothing(weights: list[float], above: list[float]) -> None:
    assert before(shares(ids(0, 1)[None], floats([weights]), EXPERTS))[0].tolist() == above


# --- what is left out


@pytest.mark.parametrize(
    ("layer", "second", "kept"),
    [
        # sqrt(0.005 / 0.05) = 0.316, sqrt(0.005 / 0.02) = 0.5, sqrt(0.005 / 20) = 0.016
        (1, 0.30, False),
        (1, 0.33, True),
        (2, 0.49, False),
        (0, 0.02, True),
        (0, 0.01, False),
    ],
)
def test_adapmoe_drops_the_second_below_its_bound(layer: int, second: float, kept: bool) -> None:
    gate = AdaptiveGate(ARRAYS["adapmoe"], ROUTED)
    found = gate.keep(route([[0, 1]], [[1 - second, second]], layer=layer), view())
    assert found.tolist() == [[True, kept]]
    assert gate.renormalises


def test_adapmoe_drops_the_tail_of_more() -> None:
    """Parts 0.5, 0.2, 0.2, 0.1 have tails 1, 0.5, 0.3, 0.1; the bound of layer 1 is 0.316."""
    gate = AdaptiveGate(ARRAYS["adapmoe"], ROUTED)
    found = gate.keep(route([[4, 0, 1, 2]], [[0.1, 0.5, 0.2, 0.2]]), view())
    assert found.tolist() == [[False, True, True, False]]
    everything = AdaptiveGate(ARRAYS["adapmoe"], ROUTED, tolerance=0)
    assert everything.keep(route([[4, 0]], [[0.0, 1.0]]), view()).all()
    assert (everything.exact, gate.exact) == (True, False)


@pytest.mark.parametrize(
    ("resident", "kept"),
    [
        ([], [True, True, False]),
        ([(1, 2)], [True, True, True]),
        ([(0, 2), (1, 0)], [True, True, False]),
    ],
)
def test_hobbit_skips_missing_experts_of_the_tail(
    resident: list[tuple[int, int]], kept: list[bool]
) -> None:
    """s = 0, 0.7, 0.95: only the last is above T2 = 0.9."""
    found = route([[0, 1, 2]], [[0.7, 0.25, 0.05]])
    assert MissingTail().keep(found, view(resident=there(*resident))).tolist() == [kept]
    assert not MissingTail().exact
    assert MissingTail(1).exact


def test_odp_drops_what_the_median_does_without() -> None:
    """Twenty tokens with ratios w1/w0 from 0.05 to 1: the ten below the median lose the second."""
    ratios = [0.05 * (1 + n) for n in range(20)]
    tokens = route([[0, 1]] * 20, [[1.0, ratio] for ratio in ratios])
    found = CalibratedTail(protected=0).keep(tokens, view())
    median = float(np.median(ratios))
    assert found[:, 0].all()
    assert found[:, 1].tolist() == [ratio > median for ratio in ratios]


def test_odp_waits_for_enough_tokens_and_spares_the_important() -> None:
    few = route([[0, 1]] * 4, [[1.0, 0.1 * n] for n in range(4)])
    assert CalibratedTail().keep(few, view()).all()
    states = [[1.0, 0.0, 0.0]] * 99 + [[-9.0, 9.0, 0.0]]
    many = route([[0, 1]] * 100, [[1.0, 0.1]] * 50 + [[1.0, 0.0]] * 50, hidden=states)
    found = CalibratedTail().keep(many, view())
    assert found[99].all(), "the largest state, one of the 2 %"
    assert not found[98, 1]
    assert CalibratedTail(quantile=0).keep(many, view()).all()
    assert (CalibratedTail(quantile=0).exact, CalibratedTail().exact) == (True, False)


THINNINGS = {
    "adapmoe": lambda: AdaptiveGate(ARRAYS["adapmoe"], ROUTED, tolerance=100.0),
    "hobbit": lambda: MissingTail(0.0),
    "odp": lambda: CalibratedTail(quantile=1.0, protected=0),
}


@STEADY
@given(
    st.sampled_from(list(THINNINGS)),
    st.lists(st.permutations(range(EXPERTS + 2)), min_size=1, max_size=30),
    st.integers(0, 2**32 - 1),
)
def test_thinning_keeps_one_of_every_token(name: str, orders: list, seed: int) -> None:
    thinning: Thinning = THINNINGS[name]()
    random = np.random.default_rng(seed)
    weights = np.round(random.random((len(orders), 4)), 1) + 0.05
    experts = np.array(orders)[:, :4]
    # A token whose experts are none at all has none to keep.
    experts[(experts >= EXPERTS).all(axis=1)] = np.arange(4)
    weights[experts >= EXPERTS] = 0
    found = thinning.keep(route(experts.tolist(), weights.tolist()), view())
    assert found.shape == experts.shape
    assert found.dtype == bool
    assert (found & (experts < EXPERTS)).any(axis=1).all()


# --- precisions


def test_hobbit_reads_what_tokens_lean_on_as_it_is() -> None:
    """s of the first token 0, 0.5, 0.8; of the second 0, 0.7: expert 2 is high for it alone."""
    found = route([[0, 1, 2], [2, 3, 9]], [[0.5, 0.3, 0.2], [0.7, 0.3, 0.0]])
    said = ByShare().pick(demand(found), view(route=found))
    assert dict(zip([0, 1, 2, 3], said.tolist(), strict=True)) == {0: 0, 1: 0, 2: 0, 3: 1}
    assert ByShare.names == ("as-is", "int4")
    assert ByShare(1).exact
    ahead = ByShare().pick_ahead(Want(2, ids(5, 1, 0), floats([0.5, 0.3, 0.2])), view())
    assert ahead.tolist() == [0, 0, 1]


def test_edgemoe_has_a_width_for_each_expert() -> None:
    made = ByExpert(ARRAYS["edgemoe"], ROUTED)
    assert made.names == ("as-is", "int8", "int4", "int2")
    found = Demand(1, ids(0, 1, 2, 3), ids(1, 1, 1, 1), floats([1] * 4))
    assert made.pick(found, view()).tolist() == [2, 3, 1, 0]
    assert made.pick_ahead(Want(0, ids(1), floats([1])), view()).tolist() == [0]
    alike = ByExpert({"bits": np.full((LAYERS, EXPERTS), 4.0, np.float32)}, ROUTED)
    assert alike.names == ("as-is", "int4")
    assert alike.pick(found, view()).tolist() == [1] * 4
    assert ByExpert({"bits": np.full((LAYERS, EXPERTS), 16.0, np.float32)}, ROUTED).exact


def test_d2moe_shares_the_bits_out_by_capacity() -> None:
    """Ten tokens of one expert each beside a second: 30 % of choices get 8, 40 % 4, 30 % 2 bits."""
    random = np.random.default_rng(0)
    made, widths = ByToken(), []
    for _ in range(400):
        first = random.uniform(0.5, 1)
        found = route([[0, 1]], [[first, 1 - first]])
        widths += made.pick(demand(found), view(route=found)).tolist()
    late = np.array(widths[200:])
    assert [round(float((late == width).mean()), 1) for width in range(4)] == [0, 0.3, 0.4, 0.3]
    assert ByToken((0, 0, 0)).exact


def test_d2moe_reads_the_most_bits_that_a_token_asks_for() -> None:
    found = route([[0, 1], [1, 2]], [[0.9, 0.1], [0.8, 0.2]])
    said = ByToken().pick(demand(found), view(route=found)).tolist()
    assert said[0] == 1
    assert said[1] <= 2, "0.8 counts, not 0.1"
    assert said[2] >= said[1]


@STEADY
@given(st.sampled_from(["hobbit", "edgemoe", "d2moe"]), st.integers(0, 2**32 - 1))
def test_precisions_are_some_of_their_names(name: str, seed: int) -> None:
    made = {"hobbit": ByShare(), "edgemoe": ByExpert(ARRAYS["edgemoe"], ROUTED), "d2moe": ByToken()}
    random = np.random.default_rng(seed)
    for _ in range(3):
        tokens = int(random.integers(1, 5))
        experts = np.array([random.permutation(EXPERTS + 1)[:3] for _ in range(tokens)])
        found = route(experts.tolist(), random.random((tokens, 3)).tolist())
        wanted = demand(found)
        said = made[name].pick(wanted, view(route=found))
        assert said.shape == wanted.experts.shape
        ahead = made[name].pick_ahead(Want(2, wanted.experts, wanted.weight), view())
        for answer in (said, ahead):
            assert ((answer >= 0) & (answer < len(made[name].names))).all()


def test_hottest_first() -> None:
    found = Demand(1, ids(0, 1, 2, 3), ids(1, 3, 3, 9), floats([0.9, 0.4, 0.5, 1.0]))
    said = FetchHottest().fetch(found, np.array([False, False, False, True]), view())
    assert said.tolist() == [2, 1, 0]
    assert not len(FetchHottest().elsewhere(found, np.zeros(4, dtype=bool), view()))


# --- who chooses


def test_a_pre_gate_chooses_for_the_next_layer() -> None:
    arrays = {"gate": np.zeros((LAYERS, HIDDEN, EXPERTS), np.float32)}
    arrays["gate"][2, 1, 5] = arrays["gate"][2, 1, 0] = 1  # the second number asks for 5 and 0
    arrays["bias"] = np.zeros((LAYERS, EXPERTS), np.float32)
    arrays["bias"][2, 3] = 0.5
    gate = PreGate(arrays, ROUTED)
    own = [[0, 0.1, 0.9, 0, 0, 0]]
    assert gate.rank(choice(own, layer=0, hidden=floats([[1, 0, 0]])), there()[:1]) is None
    gate.rank(choice(own, layer=1, hidden=floats([[0, 1, 0]])), there()[:1])
    (want,) = Chosen(gate).forecast(view(ahead=(Ahead(2),)))
    assert sorted(want.experts.tolist()) == [0, 5]
    ranking = gate.rank(choice(own, layer=2, hidden=floats([[9, 9, 9]])), there()[:1])
    assert ranking is not None
    assert best(ranking) == [[0, 5]]
    # Without the second number, only the bias speaks.
    gate.rank(choice(own, layer=1, hidden=floats([[1, 0, 0]])), there()[:1])
    assert best(gate.scores(2), 1) == [[3]]


def test_one_router_chooses_the_whole_path() -> None:
    arrays = ARRAYS["read-me"]
    path, state = WholePath(arrays, ROUTED), floats([[0.3, -1.0, 2.0], [1.0, 1.0, 1.0]])
    assert path.rank(choice([[1, 0, 0, 0, 0, 0]] * 2, layer=0, hidden=state), there()[:2]) is None
    inner = np.maximum(state @ arrays["read"] + arrays["read_bias"], 0)
    for layer in range(1, LAYERS):
        said = inner @ arrays["say"][layer] + arrays["say_bias"][layer]
        ranking = path.rank(
            choice([[1, 0, 0, 0, 0, 0]] * 2, layer=layer, hidden=state), there()[:2]
        )
        assert ranking == pytest.approx(said, abs=1e-5)
    wants = Chosen(path, depth=2).forecast(view(layer=1, ahead=(Ahead(2), Ahead(3))))
    assert [want.layer for want in wants] == [2, 3]


def test_cache_prior_lifts_residents_by_a_part_of_the_range() -> None:
    """Logits of 0 to -4: the range is 4, so lambda 0.3 lifts by 1.2; J = 1 stays."""
    logits = floats([[0, -0.5, -1.0, -1.5, -4.0, -4.0]])
    scores = (np.exp(logits) / np.exp(logits).sum()).tolist()
    resident = np.array([[False, False, True, True, False, True]])
    found = CachePrior().rank(choice(scores), resident)
    assert found is not None
    assert best(found) == [[0, 2]], "-1 + 1.2 is above -0.5; the best one stays"
    assert best(CachePrior(0.1).rank(choice(scores), resident)) == [[0, 1]]
    assert best(CachePrior(5, kept=2).rank(choice(scores), resident)) == [[0, 1]]
    assert CachePrior().rank(choice(scores, phase="prefill"), resident) is None
    assert CachePrior(0).exact


@pytest.mark.parametrize("ruled_out", [-np.inf, 0.0])
def test_cache_prior_leaves_groups_to_the_router(ruled_out: float) -> None:
    """Families that choose groups first rule the others out: these have no logits to count."""
    kept = np.exp(floats([0, -0.5, -1.0, -1.5]))
    scores = [[*(kept / kept.sum() * 0.8).tolist(), ruled_out, ruled_out]]
    resident = np.array([[False, False, False, True, True, True]])
    found = CachePrior(0.75).rank(choice(scores), resident)
    assert found is not None
    assert best(found) == [[0, 3]], "the range is 1.5: -1.5 + 1.125 is above -0.5"
    assert best(CachePrior(0.6).rank(choice(scores), resident)) == [[0, 1]]


@pytest.mark.parametrize(
    ("resident", "served"),
    [
        ([], [0, 1]),  # nobody is there to replace the second
        ([4, 5], [0, 4]),  # both missing: the better one stays, the best resident replaces
        ([0, 3], [0, 1]),  # one missing: it is read
        ([1, 3], [0, 1]),
        ([0, 1], [0, 1]),
    ],
)
def test_daop_replaces_the_second_missing_one(resident: list[int], served: list[int]) -> None:
    mask = np.isin(np.arange(EXPERTS), resident)[None]
    asked = choice([[0.4, 0.3, 0.1, 0.05, 0.1, 0.05]])
    ranking = BestResident().rank(asked, mask)
    assert (best(ranking) if ranking is not None else [[0, 1]]) == [served]
    assert BestResident().rank(replace(asked, phase="prefill"), mask) is None
    assert BestResident(kept=2).rank(asked, mask) is None
    exact = [BestResident(kept, top_k=2).exact for kept in (0, 1, 2, 3)]
    assert exact == [False, False, True, True]
    assert not BestResident(kept=9).exact, "nobody says of how many"


def test_swapmoe_serves_from_what_was_important_lately() -> None:
    periodic = PeriodicSet((LAYERS, EXPERTS), slots=3, top_k=3, every=4)
    old, new = [[0.4, 0.3, 0.2, 0.1, 0, 0]], [[0, 0, 0.1, 0.2, 0.3, 0.4]]
    for _ in range(4):
        assert periodic.rank(choice(old, layer=0), there()[:1]) is None
    assert SetAhead(periodic).forecast(view(ahead=(Ahead(1),))) == []
    ranking = periodic.rank(choice(new, layer=0), there()[:1])
    assert ranking is not None
    assert best(ranking, 3) == [[0, 1, 2]], "the set of the last four tokens; of ties the first"
    (want,) = SetAhead(periodic).forecast(view(resident=there((0, 1)), ahead=(Ahead(0),)))
    assert want.experts.tolist() == [0, 2]
    facts = view(resident=there((0, 0), (0, 5)))
    said = OutsideFirst(periodic).priorities(ids(0, 0), ids(0, 5), facts)
    assert said[1] < said[0]
    for _ in range(3):
        periodic.rank(choice(new, layer=0), there()[:1])
    last = periodic.rank(choice(old, layer=0), there()[:1])
    assert last is not None
    assert best(last, 3) != [[0, 1, 2]], "what is new has taken over"


# --- what comes


def test_a_trail_outlives_the_arrays_that_it_was_shown() -> None:
    """The engine reuses its own from layer to layer."""
    trail, shown = Trail(), route([[1, 4]], [[0.9, 0.1]], layer=1)
    trail.observe(demand(shown), view(layer=1, route=shown))
    shown.experts[:], shown.weights[:] = 0, 0
    later = replace(shown, layer=2)
    trail.observe(demand(later), view(layer=2, route=later))
    assert [each.experts.tolist() for each in trail.routes] == [[[0, 0]], [[1, 4]]]
    assert trail.routes[1].weights[0, 0] == pytest.approx(0.9)


def test_edgemoe_looks_paths_up() -> None:
    trail = Trail()
    paths = PathDictionary(ARRAYS["edgemoe"], ROUTED, trail)
    assert paths.forecast(view(ahead=(Ahead(1),))) == []

    def see(layer: int, experts: list[list[int]], weights: list[list[float]]) -> View:
        found = route(experts, weights, layer=layer)
        facts = view(layer=layer, route=found, ahead=(Ahead(layer + 1),))
        trail.observe(demand(found), facts)
        return facts

    (want,) = paths.forecast(see(0, [[4, 0]], [[0.6, 0.4]]))
    assert (want.layer, want.experts.tolist()) == (1, [2])  # after any and 4
    see(0, [[1, 0]], [[0.4, 0.6]])
    (want,) = paths.forecast(see(1, [[1, 2]], [[0.9, 0.1]]))
    assert (want.experts.tolist(), want.scores.tolist()) == ([5, 3], [0.75, 0.25])  # after 0 and 1
    (want,) = paths.forecast(see(2, [[1, 2]], [[0.9, 0.1]]))
    assert want.experts.tolist() == [0, 1]  # no such path: what layer 3 uses anyway


# --- presets


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: row.name)
def test_presets_are_approximate_and_say_what_they_need(row: object) -> None:
    made = row.build(replace(GIVEN, learned={kind: ARRAYS[kind] for kind in row.learned}))
    assert not made.exact
    assert not row.exact
    assert row.nested == (not made.precision.exact)
    for watcher in made.watchers:
        watcher.begin(Prompt(1, None, ids()))
        watcher.end(1)
        watcher.end(2)


def test_hobbit_goes_by_what_was_searched_if_it_was() -> None:
    row = next(row for row in PRESETS if row.name == "hobbit")
    facts = view(layer=0)
    entries = ids(1, 3), ids(0, 0)
    alike = row.build(GIVEN).evictor.priorities(*entries, facts)
    searched = row.build(replace(GIVEN, learned=ARRAYS)).evictor.priorities(*entries, facts)
    assert alike.tolist() == pytest.approx([0.25 * 3 / 4, 0.25 * 1 / 4])
    assert searched.tolist() == pytest.approx([0.1 * 3 / 4, 0.1 * 1 / 4])
