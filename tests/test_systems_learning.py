"""Exact systems that learn: each rule against a case by hand from its paper's equation."""

import math
from dataclasses import replace

import numpy as np
import pytest

import routes
from passes import COMING, listed, prompt, show
from retinue.policy.base import View
from retinue.policy.evict.activation import EPS, Activation
from retinue.policy.evict.map_frequency import MapFrequency
from retinue.policy.predict.activation_match import ActivationMatch
from retinue.policy.predict.map_search import MapSearch, smallest_sets
from retinue.policy.predict.promoe import Promoe
from retinue.policy.watch.activations import Activations
from retinue.policy.watch.expert_maps import ExpertMaps
from retinue.policy.watch.seats import Seats
from routes import EXPERTS, LAYERS, floats, view
from test_policies import leaving


def test_seats_are_few() -> None:
    seats = Seats()
    assert [seats.take(number) for number in (7, 3, 9)] == [0, 1, 2]
    assert seats.take(3) == 1
    assert seats.leave(3) == 1
    assert seats.leave(3) is None
    assert seats.of(np.array([9, 3, 7, 7])).tolist() == [2, -1, 0, 0]
    assert seats.leave(7) == 0
    assert [seats.take(number) for number in (4, 5, 6)] == [0, 1, 3]


# --- moe-infinity: activation matrices

# Two requests: tokens by layer and expert.
FIRST = [[2, 2, 0, 0, 0, 0], [3, 1, 0, 0, 0, 0], [0, 0, 2, 2, 0, 0], [4, 0, 0, 0, 0, 0]]
SECOND = [[0, 0, 0, 0, 2, 2], [0, 0, 0, 0, 4, 0], [0, 0, 0, 0, 1, 3], [0, 0, 0, 0, 2, 2]]


def collection(capacity: int = 2) -> Activations:
    return Activations(floats([FIRST, SECOND]), capacity)


def test_a_request_s_matrix_counts_tokens() -> None:
    seen = collection()
    seen.begin(prompt(5))
    show(seen, [[0, 1], [0, 2], [EXPERTS, 0]], 0, sequences=[5, 5, 5])
    show(seen, [[4, 1]], 0, sequences=[5])
    assert seen.counts[0].tolist() == [3, 2, 1, 0, 1, 0]
    assert not seen.counts[1:].any()


def test_what_the_nearest_matrix_used_comes() -> None:
    seen = collection()
    seen.begin(prompt(5))
    facts = show(seen, [[0, 2]], 0, sequences=[5])
    # With (1, 0, 1, 0, 0, 0), row 0 of the first has cosine 2 / (sqrt 2 * sqrt 8) = 0.5, the
    # second 0. p(l, e) * (1 - (l - i) / L): in layer 1 0.75 and 0.25, each by 3/4; in layer 2
    # 0.5 and 0.5, by 1/2; in layer 3 all on expert 0, by 1/4.
    wants = ActivationMatch(seen).forecast(facts)
    found = [(1, [0], [0.5625]), (2, [2, 3], [0.25, 0.25]), (3, [0], [0.25]), (1, [1], [0.1875])]
    assert listed(wants) == found


def test_the_mean_over_layers_decides() -> None:
    seen = collection()
    seen.begin(prompt(5))
    show(seen, [[0, 1]], 0, sequences=[5])  # cosines 1 and 0
    show(seen, [[4, 5]], 1, sequences=[5])  # 0 and 4 / (4 * sqrt 2)
    assert seen.expected() == pytest.approx(floats(FIRST) / 4)
    show(seen, [[4, 5]], 2, sequences=[5])  # 0 and 4 / (sqrt 10 * sqrt 2): 0.71 + 0.89 in all
    assert seen.expected() == pytest.approx(floats(SECOND) / 4)


def test_each_request_of_a_batch_has_its_own() -> None:
    seen = collection()
    for number in (5, 6):
        seen.begin(prompt(number))
    show(seen, [[0, 1], [4, 5]], 0, sequences=[5, 6])
    assert seen.requests == 2
    assert seen.expected() == pytest.approx(floats(FIRST) / 4 + floats(SECOND) / 4)
    facts = show(seen, [[4, 5]], 1, sequences=[6])
    assert seen.expected() == pytest.approx(floats(SECOND) / 4)
    assert [want.layer for want in ActivationMatch(seen).forecast(facts)] == [2, 3, 2]


def test_who_never_began_is_not_counted() -> None:
    seen = collection()
    facts = show(seen, [[0, 1]], 0, sequences=[5])
    assert not seen.counts.any()
    assert ActivationMatch(seen).forecast(facts) == []
    seen.end(5)
    assert seen.size == 2


def test_an_ended_request_takes_the_place_of_the_most_similar() -> None:
    seen = collection()
    seen.begin(prompt(5))
    for layer in range(LAYERS):
        show(seen, [[0, 1]], layer, sequences=[5])
    seen.end(5)
    assert seen.size == 2
    seen.begin(prompt(6))
    show(seen, [[0, 1]], 0, sequences=[6])
    assert seen.expected()[3].tolist() == [0.5, 0.5, 0, 0, 0, 0], "the first was most like it"
    show(seen, [[4, 5]], 0, sequences=[6])
    show(seen, [[4, 5]], 1, sequences=[6])
    show(seen, [[4, 5]], 2, sequences=[6])
    assert seen.expected() == pytest.approx(floats(SECOND) / 4), "the second is still there"


def test_a_collection_grows_until_it_is_full() -> None:
    seen = collection(capacity=3)
    for number in range(3):
        seen.begin(prompt(number))
        show(seen, [[3, 2]], 1, sequences=[number])
        seen.end(number)
        assert seen.size == 3
    seen.begin(prompt(9))
    show(seen, [[2, 3]], 1, sequences=[9])
    assert seen.expected()[1].tolist() == [0, 0, 0.5, 0.5, 0, 0]


def test_used_least_by_the_request_leaves_first() -> None:
    seen = collection()
    seen.begin(prompt(5))
    facts = show(seen, [[0, 1], [0, 2]], 0, sequences=[5, 5])
    facts = show(seen, [[3, 4], [3, 5]], 2, sequences=[5, 5])
    # (count + eps) / n * (1 - l / L): (0, 0) 2/4, (0, 1) 1/4, (2, 3) 2/4 * 1/2, (2, 4) 1/4 * 1/2.
    entries = [(0, 0), (0, 1), (2, 3), (2, 4), (1, 0), (3, 0)]
    layers, experts = np.array(entries).T
    found = Activation(seen).priorities(layers, experts, facts)
    unused = [EPS * 0.75, EPS * 0.25]
    wanted = [(2 + EPS) / 4, (1 + EPS) / 4, (2 + EPS) / 8, (1 + EPS) / 8, *unused]
    assert found == pytest.approx(wanted)


# --- fmoe: expert maps


@pytest.mark.parametrize(
    ("delta", "kept"),
    [
        # Of 0.5, 0.3, 0.1, 0.1: the two that are needed anyway, and as many as make delta.
        (0.0, [1, 3]),
        (0.8, [1, 3]),
        (0.81, [1, 3, 0]),
        (0.95, [1, 3, 0, 4]),
        (7.0, [1, 3, 0, 4, 2, 5]),
        (-1.0, [1, 3]),
    ],
)
def test_the_smallest_set_of_a_sum(delta: float, kept: list[int]) -> None:
    row = floats([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]])
    wanted = np.zeros((1, EXPERTS))
    wanted[0, kept] = row[0, kept]
    assert smallest_sets(row, floats([delta]), 2) == pytest.approx(wanted)


UP, DOWN = [0.6, 0.2, 0.1, 0.1, 0, 0], [0, 0, 0.1, 0.1, 0.2, 0.6]
MAPS = floats([[UP] * LAYERS, [DOWN, UP, DOWN, DOWN]])
MEANINGS = floats([[1, 0, 0], [0, 2, 0]])  # one is twice as long, which says nothing


def maps(distance: int = 2, capacity: int = 2) -> ExpertMaps:
    return ExpertMaps(MAPS, MEANINGS, capacity, distance)


def test_the_first_layers_go_by_meaning_and_the_others_by_their_way() -> None:
    store = maps()
    store.begin(prompt(5, [0.6, 0.8, 0]))  # cosines 0.6 and 0.8
    facts = show(store, [[0, 1]], 0, scores=[UP], sequences=[5])
    # Layer 1 is one of the first two: by meaning the second map, whose row is `UP`, delta 0.2.
    # Layer 2 goes by the way so far: the first map, cosine 1, delta 0. p / (l - l_now).
    facts = replace(facts, ahead=COMING[0][:2])
    wants = MapSearch(store).forecast(facts)
    assert listed(wants) == [
        (1, [0], [0.6]),
        (2, [0], [0.3]),
        (1, [1], [0.2]),
        (2, [1], [0.1]),
    ]


def test_the_way_is_all_layers_so_far() -> None:
    store = maps(distance=1)
    store.begin(prompt(5, [1, 0, 0]))
    show(store, [[4, 5]], 0, scores=[DOWN], sequences=[5])
    facts = show(store, [[0, 1]], 1, scores=[UP], sequences=[5])
    (entry,), (cosine,) = store.followed(1)
    assert (entry, cosine) == (1, pytest.approx(1))
    # The other's cosine: (UP . DOWN + UP . UP) / (2 * UP . UP) = (0.02 + 0.42) / 0.84.
    both = store._cosines(np.array([0]), 1)[0]
    assert both.tolist() == pytest.approx([0.44 / 0.84, 1])
    wants = MapSearch(store).forecast(replace(facts, ahead=COMING[1][:1]))
    assert listed(wants) == [(2, [5, 4], [0.6, 0.2])]


def test_a_prefill_has_one_map_and_a_batch_one_each() -> None:
    store = maps(distance=1)
    for number in (5, 6):
        store.begin(prompt(number, [1, 0, 0]))
    scores = [UP, DOWN, DOWN]
    show(store, [[0, 1], [4, 5], [4, 5]], 0, scores=scores, sequences=[5, 5, 6])
    assert store._own[0, 0] == pytest.approx((floats(UP) + floats(DOWN)) / 2)
    assert store._own[1, 0] == pytest.approx(floats(DOWN))
    entries, cosines = store.followed(0)
    assert entries.tolist()[1] == 1
    assert cosines[1] == pytest.approx(1)
    row, each = np.zeros(len(UP), dtype=np.int64), np.arange(len(UP))
    found = store.means(np.array([0, 1]), row, each)
    assert found == pytest.approx((floats(UP) + floats(DOWN)) / 2)


def test_a_full_store_drops_what_is_most_like_the_new_map() -> None:
    """By d/L * (cosine of meaning) + (L - d)/L * (cosine of maps), d = 2 of L = 4 layers."""
    for embedding, dropped in (([1.0, 0.0, 0.0], 0), ([0.0, 1.0, 0.0], 1)):
        store = maps()
        store.begin(prompt(5, embedding))
        # Half of its layers are like those of either map, so that the meaning decides.
        for layer, row in enumerate((UP, UP, DOWN, DOWN)):
            show(store, [[0, 1]], layer, scores=[row], sequences=[5])
        alike = store._cosines(np.array([0]), 3)[0]
        assert alike.tolist() == pytest.approx([0.88 / 1.68, 1.28 / 1.68])
        redundancy = 0.5 * alike + 0.5 * floats(embedding[:2])
        assert int(redundancy.argmax()) == dropped
        store.end(5)
        assert store.size == 2
        assert store._maps[:, dropped] == pytest.approx(floats([UP, UP, DOWN, DOWN]))
        assert store._maps[:, 1 - dropped] == pytest.approx(MAPS[1 - dropped])


def test_every_pass_leaves_a_map() -> None:
    store = maps(capacity=5)
    store.begin(prompt(5, [1, 0, 0]))
    for step in (1, 2, 3):
        for layer in range(LAYERS):
            show(store, [[2, 3]], layer, step=step, scores=[UP], sequences=[5])
        assert store.size == 1 + step
    store.end(5)
    assert store.size == 5
    assert store.used[0].tolist() == [0, 0, 3, 3, 0, 0]


def test_improbable_and_rarely_used_leaves_first() -> None:
    store = maps(distance=1)
    store.begin(prompt(5, [1, 0, 0]))
    for step, chosen in ((1, [0, 2]), (2, [0, 1]), (3, [2, 1])):
        facts = show(store, [chosen], 0, step=step, scores=[UP], sequences=[5])
    # p * freq by the first map: 0.6 * 2, 0.2 * 2, 0.1 * 2, and 0 for whom nobody used.
    order = leaving(MapFrequency(store), [(0, 0), (0, 1), (0, 2), (0, 3)], facts)
    assert order == [(0, 3), (0, 2), (0, 1), (0, 0)]
    layers, experts = np.zeros(3, dtype=np.int64), np.arange(3)
    found = MapFrequency(store).priorities(layers, experts, facts)
    assert found == pytest.approx([1.2, 0.4, 0.2])


# --- promoe: a network a layer


def by_hand() -> Promoe:
    """Two layers ahead; input 1 says expert 4, input 2 says expert 3, and a little 0 both."""
    say = np.full((LAYERS, 2, EXPERTS), -2.0, np.float32)
    say[:, 0, 4], say[:, 1, 3], say[:, :, 0] = 5, 4, 1
    arrays = {
        "stride": floats([2]),
        "read": np.tile(floats([[1, 0], [0, 1], [0, 0]]), (LAYERS, 1, 1)),
        "read_bias": np.zeros((LAYERS, 2), np.float32),
        "say": say,
        "say_bias": np.zeros((LAYERS, EXPERTS), np.float32),
    }
    return Promoe(arrays, range(LAYERS))


def inputs(layer: int, *hidden: list[float], ahead: int = 2, step: int = 9) -> View:
    chosen = [[0, 1]] * len(hidden)
    found = routes.route(chosen, [[1, 1]] * len(hidden), layer=layer, hidden=list(hidden))
    return view(layer=layer, step=step, route=found, ahead=COMING[layer][:ahead])


def test_promoe_says_what_comes_a_stride_ahead() -> None:
    predictor = by_hand()
    assert (predictor.depth, predictor.needs) == (2, {"hidden"})
    # relu((1, -1, 0) @ read) = (1, 0): logits 5 for expert 4, 1 for 0, -2 for the others.
    (want,) = predictor.forecast(inputs(0, [1, -1, 0]))
    high, low = 1 / (1 + math.exp(-5)), 1 / (1 + math.exp(-1))
    assert listed([want]) == [(2, [4, 0], [high, low])]
    both = predictor.forecast(inputs(1, [-1, 1, 0]))
    assert [(one.layer, one.experts.tolist()) for one in both] == [(2, [4, 0]), (3, [3, 0])]
    assert [one.layer for one in predictor.forecast(inputs(2, [1, 0, 0]))] == [3]
    assert predictor.forecast(inputs(0, [1, 0, 0], step=10))[0].layer == 2


def test_promoe_keeps_what_it_said_for_the_next_layer_of_a_prompt() -> None:
    predictor = by_hand()
    assert predictor.forecast(inputs(0, [1, 0, 0], [0, 1, 0], ahead=1)) == []
    (want,) = predictor.forecast(inputs(1, [1, 0, 0], [0, 1, 0], ahead=1))
    assert (want.layer, want.experts.tolist()) == (2, [0, 4, 3])  # 0 is the second of both tokens
    assert predictor.forecast(inputs(1, [1, 0, 0], ahead=1, step=10)) == [], "of another pass"
