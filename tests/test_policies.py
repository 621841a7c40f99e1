"""Policies as tables of facts and answers."""

import numpy as np
import pytest

import presets_table
import routes
from disk import ids
from retinue.errors import Refused, UsageError
from retinue.policy.base import SIGNALS, Ahead, Evictor, View
from retinue.policy.evict.heat import Heat
from retinue.policy.evict.pace import Pace
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import NoPredictor
from retinue.policy.predict.next_gate import NextGate
from retinue.policy.predict.proven import Proven
from retinue.policy.predict.whole_layer import WholeLayer
from retinue.policy.preset import Given
from retinue.policy.presets import PRESETS, preset
from retinue.types import Demand

LAYERS, EXPERTS = 4, 6


def view(**facts: object) -> View:
    """Facts of a model of four layers with six experts each, none of them ever used."""
    shape = (LAYERS, EXPERTS)
    base: dict[str, object] = {"step": 9, "layer": 1, "phase": "decode", "top_k": 2, "slots": 8}
    base |= {"layers": LAYERS, "experts": EXPERTS, "resident": np.zeros(shape, dtype=bool)}
    base |= {"last_used": np.full(shape, -1, dtype=np.int64)}
    base |= {"heat": np.zeros(shape, dtype=np.float32)}
    return View(**(base | facts))  # type: ignore[arg-type]


def leaving(evictor: Evictor, entries: list[tuple[int, int]], facts: View) -> list:
    """The entries in the order in which they leave."""
    layers, experts = ids(*(e[0] for e in entries)), ids(*(e[1] for e in entries))
    priorities = evictor.priorities(layers, experts, facts)
    assert priorities.shape == (len(entries),)
    return [entries[i] for i in np.argsort(priorities, kind="stable")]


def table(values: dict[tuple[int, int], float], rest: float, kind: type) -> np.ndarray:
    array = np.full((LAYERS, EXPERTS), rest, dtype=kind)
    for at, value in values.items():
        array[at] = value
    return array


@pytest.mark.parametrize(
    ("used", "order"),
    [
        ({(0, 0): 3, (0, 1): 1, (0, 2): 2}, [(0, 1), (0, 2), (0, 0)]),
        ({(0, 0): 3, (3, 1): -1, (2, 2): 2}, [(3, 1), (2, 2), (0, 0)]),
        # Of one step: the layer that just ran, then the one before it; the next one stays longest.
        ({(0, 0): 5, (1, 0): 5, (2, 0): 5, (3, 0): 5}, [(1, 0), (0, 0), (3, 0), (2, 0)]),
        ({(2, 0): 4, (1, 0): 5}, [(2, 0), (1, 0)]),
        ({(0, 0): 2**40 + 1, (0, 1): 2**40}, [(0, 1), (0, 0)]),
    ],
)
def test_recency(used: dict[tuple[int, int], int], order: list[tuple[int, int]]) -> None:
    step = max(used.values())
    facts = view(last_used=table(used, -1, np.int64), step=step, layer=1)
    assert leaving(Recency(), sorted(used), facts) == order


@pytest.mark.parametrize("step", [10, 10**6, 10**9])
def test_recency_after_a_long_time(step: int) -> None:
    """A server's billionth step still tells layers apart."""
    used = {(layer, 0): step for layer in range(LAYERS)} | {(2, 1): step - 1}
    facts = view(last_used=table(used, -1, np.int64), step=step, layer=1)
    assert leaving(Recency(), sorted(used), facts) == [(2, 1), (1, 0), (0, 0), (3, 0), (2, 0)]


@pytest.mark.parametrize(
    ("heat", "order"),
    [
        ({(0, 0): 3.0, (2, 1): 0.5, (3, 2): 0.7}, [(2, 1), (3, 2), (0, 0)]),
        ({(0, 0): 0.0, (1, 0): 0.0, (2, 0): 0.0, (3, 0): 0.0}, [(1, 0), (0, 0), (3, 0), (2, 0)]),
        ({(1, 0): 0.51, (2, 0): 0.5}, [(2, 0), (1, 0)]),
    ],
)
def test_heat(heat: dict[tuple[int, int], float], order: list[tuple[int, int]]) -> None:
    facts = view(heat=table(heat, 0, np.float32), layer=1)
    assert leaving(Heat(), sorted(heat), facts) == order


@pytest.mark.parametrize(
    ("used", "share"),
    [
        ({}, 0.0),
        ({(0, 0): 9, (0, 1): 9}, 1.0),
        ({(0, 0): 9, (0, 1): 9, (0, 2): 8}, 0.5),
        ({(0, 0): 9, (0, 1): 9, (0, 2): 7}, 1.0),
        # The layers after the one that runs are a pass behind, and as good as the others.
        ({(0, 0): 9, (0, 1): 9, (1, 0): 8, (1, 1): 8, (1, 2): 7}, 0.75),
        # The pass before was a prefill, which used more than one token does.
        ({(0, 0): 9, (0, 1): 8, (0, 2): 8, (0, 3): 8}, -2.0),
        ({(0, 0): 0, (0, 1): 0}, 1.0),
    ],
)
def test_how_much_of_a_pass_the_next_one_keeps(
    used: dict[tuple[int, int], int], share: float
) -> None:
    assert view(last_used=table(used, -1, np.int64)).kept_share == share


def test_pace_asks_for_heat_until_routing_stands_still() -> None:
    # Eight experts of the last pass, and some that the pass before used besides.
    last = {(layer, expert): 9 for layer in range(LAYERS) for expert in (0, 1)}
    heat = table({(0, 0): 0.1, (0, 4): 5.0}, 0, np.float32)
    for left, first in ((1, (0, 4)), (3, (0, 0))):
        others = {(1 + n, 2): 8 for n in range(left)}
        facts = view(last_used=table(last | others, -1, np.int64), heat=heat)
        assert facts.stands_still == (left == 1)
        assert leaving(Pace(), [(0, 0), (0, 4)], facts)[0] == first


@pytest.mark.parametrize("evictor", [Recency(), Heat(), Pace()])
def test_evictors_answer_for_nobody(evictor: Evictor) -> None:
    assert leaving(evictor, [], view()) == []


@pytest.mark.parametrize(
    ("scores", "top_k", "experts", "sums"),
    [
        ([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], 2, [1, 3], [0.5, 0.3]),
        ([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], 1, [1], [0.5]),
        ([[0.6, 0.4, 0, 0, 0, 0], [0, 0.4, 0.6, 0, 0, 0]], 2, [1, 0, 2], [0.8, 0.6, 0.6]),
        ([[0.9, 0, 0, 0, 0, 0.1], [0, 0, 0, 0.2, 0.3, 0]], 1, [0, 4], [0.9, 0.3]),
        ([[0.1, 0.2, 0.3, 0.15, 0.13, 0.12]], 6, [2, 1, 3, 4, 5, 0], None),
    ],
)
def test_next_gate(
    scores: list[list[float]], top_k: int, experts: list[int], sums: list[float] | None
) -> None:
    array = np.array(scores, dtype=np.float32)
    (want,) = NextGate().forecast(view(ahead=(Ahead(2, array),), top_k=top_k))
    assert want.layer == 2
    assert want.experts.tolist() == experts
    assert len(want.scores) == len(experts)
    if sums is not None:
        assert want.scores == pytest.approx(sums)


@pytest.mark.parametrize(("left", "again"), [(0, [3]), (3, [1, 3])])
def test_next_gate_repeats_no_mistake_while_routing_stands_still(left: int, again: list) -> None:
    gate = NextGate()
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    still = {(layer, expert): 9 for layer in range(LAYERS) for expert in (0, 1)}
    others = {(layer, 2): 8 for layer in range(left)}

    def forecast(step: int) -> list[int]:
        used = table({at: when - 9 + step for at, when in (still | others).items()}, -1, np.int64)
        facts = view(ahead=(Ahead(2, scores),), step=step, last_used=used)
        (want,) = gate.forecast(facts)
        assert len(want.scores) == len(want.experts)
        gate.observe(Demand(2, ids(3, 5), ids(1, 1), np.ones(2, np.float32)), facts)
        return want.experts.tolist()

    assert forecast(9) == [1, 3]
    assert forecast(10) == again
    assert forecast(11) == again, "it goes on to know"
    assert forecast(13) == [1, 3], "what another pass came between is forgotten"


def test_next_gate_without_scores_is_silent() -> None:
    assert NextGate().forecast(view(ahead=(Ahead(2),))) == []
    assert NextGate.needs == {"next_scores"}
    assert NextGate.needs <= set(SIGNALS)


def needs(*experts: int) -> Demand:
    return Demand(2, ids(*experts), np.ones(len(experts), int), np.ones(len(experts), np.float32))


def test_ranks_that_prove_wrong_are_not_read_ahead() -> None:
    """The first choice is needed each time, the second never; who is resident is no matter."""
    proven = Proven(NextGate())
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    forecasts, resident = [], np.zeros((LAYERS, EXPERTS), dtype=bool)
    for step in range(9, 19):
        facts = view(ahead=(Ahead(2, scores),), step=step, resident=resident)
        (want,) = proven.forecast(facts)
        forecasts.append(want.experts.tolist())
        assert want.scores.tolist() == scores[0, want.experts].tolist()
        proven.observe(needs(1, 5), facts)
    assert forecasts[0] == [1, 3]
    assert forecasts[-1] == [1]
    changed = forecasts.index([1])
    assert forecasts == [[1, 3]] * changed + [[1]] * (10 - changed), "it keeps counting"
    (want,) = proven.forecast(view(ahead=(Ahead(2, scores),), resident=resident, busy=0.0))
    assert want.experts.tolist() == [1, 3], "a link that is idle has time for the unlikely"
    resident[2, 3] = True  # it costs no read, and is better not evicted
    (want,) = proven.forecast(view(ahead=(Ahead(2, scores),), resident=resident))
    assert want.experts.tolist() == [1, 3]


def test_a_rank_that_proves_right_again_is_read_again() -> None:
    proven = Proven(NextGate())
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    found = []
    for step in range(120):
        facts = view(ahead=(Ahead(2, scores),), step=step)
        (want,) = proven.forecast(facts)
        found.append(want.experts.tolist())
        proven.observe(needs(1, 3) if step >= 40 else needs(1, 5), facts)
    assert found[39] == [1]
    assert found[-1] == [1, 3]


def test_what_is_never_right_is_not_asked_for_at_all() -> None:
    proven = Proven(NextGate())
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    for step in range(20):
        facts = view(ahead=(Ahead(2, scores),), step=step)
        wants = proven.forecast(facts)
        proven.observe(needs(5), facts)
    assert wants == []


def test_forecasts_count_for_their_own_step_and_for_decoding_alone() -> None:
    proven = Proven(NextGate())
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    for step in range(20):  # what it said is asked for in a later step, or in a prompt
        for phase in ("decode", "prefill"):
            (want,) = proven.forecast(view(ahead=(Ahead(2, scores),), step=step, phase=phase))
            assert want.experts.tolist() == [1, 3]
        proven.observe(needs(5), view(step=step + 1))


def test_whole_layer() -> None:
    (want,) = WholeLayer().forecast(view(ahead=(Ahead(3),)))
    assert want.layer == 3
    assert want.experts.tolist() == list(range(EXPERTS))
    assert len(want.scores) == EXPERTS
    assert WholeLayer().forecast(view()) == []  # after the last layer
    assert not WholeLayer().speculative
    assert not WholeLayer().needs


def test_no_predictor_is_silent() -> None:
    scores = np.ones((1, EXPERTS), dtype=np.float32)
    assert NoPredictor().forecast(view(ahead=(Ahead(2, scores),))) == []


@pytest.mark.parametrize(
    ("weight", "resident", "fetched"),
    [
        ([0.1, 0.5, 0.4], [False, False, False], [3, 5, 0]),
        ([0.1, 0.5, 0.4], [False, True, False], [5, 0]),
        ([0.1, 0.5, 0.4], [True, True, True], []),
        ([0.3, 0.3, 0.3], [False, False, False], [0, 3, 5]),
        ([-0.2, 0.0, 0.1], [False, False, True], [3, 0]),
    ],
)
def test_fetch_all(weight: list[float], resident: list[bool], fetched: list[int]) -> None:
    demand = Demand(1, ids(0, 3, 5), ids(1, 1, 1), np.array(weight, dtype=np.float32))
    assert FetchAll().fetch(demand, np.array(resident), view()).tolist() == fetched
    assert not len(FetchAll().elsewhere(demand, np.array(resident), view()))
    assert FetchAll.exact


QUESTIONS = {"evict", "predict", "miss", "route", "place", "forecast", "thin", "precision", "order"}
UNTOLD = [name for name, row in PRESETS.items() if (row.profiled or row.learned) and not row.fixed]


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_what_they_say(name: str) -> None:
    row = preset(name)
    made = row.build(routes.given())
    assert row.name == name
    assert made.exact == row.exact
    assert made.predictor.needs <= set(SIGNALS)
    assert row.paper
    assert {part.partition(": ")[0] for part in row.parts} <= QUESTIONS
    assert not made.placement.periodic or f"forecast: {made.forecaster}" in row.parts
    assert made.placement.fixed == row.fixed
    assert made.placement.needs_profile <= row.profiled
    nothing = made.placement.fixed and made.fetch_above >= 1
    assert ("miss: fetch nothing" in row.parts) == nothing
    assert "build" not in row.as_dict()
    assert row.as_dict()["name"] == name


@pytest.mark.parametrize("name", UNTOLD)
def test_presets_say_what_they_lack(name: str) -> None:
    """When they are built, but for placements, which ask for their profile later."""
    row = preset(name)
    with pytest.raises(Refused, match="|".join([*row.learned, "profile"])) as caught:
        row.build(routes.GIVEN)
    assert "retinue" in caught.value.hint


def test_the_page_of_presets_is_the_table() -> None:
    written = presets_table.PAGE.read_text(encoding="utf-8")
    assert written == presets_table.page(), "run `python -m tests.presets_table`"
    for name in PRESETS:
        assert f"| `{name}` |" in written


def test_presets_share_nothing() -> None:
    assert preset("auto").build(Given()).evictor is not preset("auto").build(Given()).evictor


def test_the_default_preset_is_exact() -> None:
    assert preset("auto").exact


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UsageError, match="unknown preset: `fast`") as caught:
        preset("fast")
    for name in PRESETS:
        assert name in caught.value.hint
