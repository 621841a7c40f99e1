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
