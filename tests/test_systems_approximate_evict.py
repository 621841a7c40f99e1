"""Who leaves in approximate systems: the papers' scores by hand, and total orders throughout."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disk import STEADY, ids
from retinue.policy.base import Evictor, Prompt, View
from retinue.policy.evict.frequency_distance import FrequencyDistance
from retinue.policy.evict.known_paths import KnownPaths
from retinue.policy.evict.multidimensional import Multidimensional
from retinue.policy.evict.quota import Quota
from retinue.policy.evict.recency import Recency
from retinue.policy.evict.used_here import UsedHere
from retinue.policy.route.periodic_set import OutsideFirst, PeriodicSet
from retinue.policy.uses import SequenceUses
from retinue.types import FloatArray
from routes import EXPERTS, LAYERS, choice, demand, floats, route, there, view


def see(watcher: object, facts: View) -> None:
    assert facts.route is not None
    watcher.observe(demand(facts.route), facts)


def test_uses_of_a_sequence() -> None:
    """Three tokens: expert 0 by all, expert 1 by the first two, as a second choice of 0.7."""
    uses = SequenceUses(high=0.6)
    uses.begin(Prompt(7, None, ids()))
    for step, experts in enumerate(([0, 1], [0, 1], [0, 2])):
        found = route([experts], [[0.7, 0.3]], sequences=[7])
        see(uses, view(step=step, route=found))
    layers, experts = ids(1, 1, 1, 1), ids(0, 1, 2, 3)
    assert uses.recent(layers, experts).tolist() == pytest.approx([1, 2 / 3, 1, 0])
    assert uses.frequent(layers, experts).tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert uses.demanding(layers, experts).tolist() == pytest.approx([1, 0, 0, 0])
    uses.end(7)
    assert not uses.frequent(layers, experts).any()


def test_sequences_are_counted_apart_and_a_pass_once() -> None:
    uses = SequenceUses()
    for layer in (0, 1):
        found = route([[0, 1], [2, 3], [2, 4]], [[0.5, 0.5]] * 3, layer=layer, sequences=[1, 2, 2])
        see(uses, view(step=1, layer=layer, route=found))
    said = uses.frequent(ids(1, 1, 1), ids(0, 2, 4))
    assert said.tolist() == pytest.approx([0.5, 0.5, 0.25])
    uses.begin(Prompt(1, None, ids()))
    assert uses.frequent(ids(1), ids(2)).tolist() == [1.0], "only the second is left"


def test_hobbits_four_dimensions() -> None:
    """After 4 tokens, in layer 1 of 4: 0.4 R/T + 0.3 F/T + 0.2 H/T + 0.1 (1 - distance/4)."""
    uses = SequenceUses(high=0.6)
    for step in range(4):
        found = route([[0, 1 + step % 2]], [[0.8, 0.2]], layer=2)
        see(uses, view(step=step, route=found))
    said = Multidimensional(uses, (0.4, 0.3, 0.2, 0.1)).priorities(
        ids(2, 2, 2, 1, 0), ids(0, 1, 2, 0, 0), view(layer=1)
    )
    near = 0.1 * (1 - 1 / 4)
    assert said.tolist() == pytest.approx(
        [
            0.4 + 0.3 + 0.2 + near,
            0.4 * 3 / 4 + 0.3 * 2 / 4 + near,
            0.4 + 0.3 * 2 / 4 + near,
            0,
            0.025,
        ]
    )


def test_edgemoes_frequency_by_distance() -> None:
    """f of three in four tokens and one in four; distances 1 (the next layer) and 3."""
    evictor = FrequencyDistance(LAYERS, EXPERTS)
    for layer in (0, 2):
        found = route([[0, 9]] * 3 + [[1, 9]], [[1, 0]] * 4, layer=layer)
        see(evictor, view(layer=layer, route=found))
    layers, experts = ids(2, 0, 2, 0), ids(0, 0, 1, 1)
    said = evictor.priorities(layers, experts, view(layer=1))
    assert (said * 9).tolist() == pytest.approx([3, 1, 1, 1 / 3])


class Path:
    def __init__(self, said: dict[int, FloatArray]) -> None:
        self._said = said

    def scores(self, layer: int) -> FloatArray | None:
        return self._said.get(layer)


def test_belady_on_what_is_known() -> None:
    """In layer 1: layer 2 will use 0 and 1, layer 3 will use 4 and 5; the rest goes by age."""
    path = Path({2: floats([[2, 1, 0, 0, 0, 0]]), 3: floats([[0, 0, 0, 0, 1, 2]])})
    used = np.full((LAYERS, EXPERTS), 3)
    used[0, 0] = 8
    entries = [(2, 0), (3, 4), (2, 2), (0, 0)]
    layers, experts = ids(*(e[0] for e in entries)), ids(*(e[1] for e in entries))
    said = KnownPaths(path).priorities(layers, experts, view(layer=1, last_used=used))
    order = [entries[i] for i in np.argsort(said)]
    assert order == [(2, 2), (0, 0), (3, 4), (2, 0)]


def used_uses() -> SequenceUses:
    uses = SequenceUses()
    see(uses, view(route=route([[0, 1], [0, 3]], [[0.6, 0.4]] * 2, sequences=[1, 2])))
    return uses


def with_set() -> PeriodicSet:
    found = PeriodicSet((LAYERS, EXPERTS), slots=8, top_k=2, every=1)
    for _ in range(2):
        found.rank(choice([[0.4, 0.3, 0.2, 0.1, 0, 0]], layer=0), there()[:1])
    return found


def test_nobody_runs_and_somebody_leaves() -> None:
    """As in the check of a model that was just loaded."""
    said = UsedHere(SequenceUses()).priorities(ids(0, 1), ids(1, 2), view())
    assert said.tolist() == [0, 0]


EVICTORS: dict[str, Callable[[], Evictor]] = {
    "hobbit": lambda: Multidimensional(used_uses()),
    "edgemoe": lambda: FrequencyDistance(LAYERS, EXPERTS),
    "daop": lambda: Quota(UsedHere(used_uses())),
    "adapmoe": lambda: Quota(Recency(), lambda view: np.arange(LAYERS, dtype=np.float32)),
    "read-me": lambda: KnownPaths(Path({2: floats([[2, 1, 0, 0, 0, 0]])})),
    "swapmoe": lambda: OutsideFirst(with_set()),
}


@STEADY
@given(
    st.sampled_from(list(EVICTORS)),
    st.sets(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), max_size=20),
    st.integers(0, 2**32 - 1),
)
def test_evictors_are_total_orders(name: str, entries: set, seed: int) -> None:
    """A number for everyone, whoever is asked about, and the same order whatever the order."""
    random, listed = np.random.default_rng(seed), sorted(entries)
    used = random.integers(-1, 9, (LAYERS, EXPERTS))
    facts = view(last_used=used, resident=there(*listed), layer=int(random.integers(LAYERS)))
    layers, experts = ids(*(e[0] for e in listed)), ids(*(e[1] for e in listed))
    said = EVICTORS[name]().priorities(layers, experts, facts)
    assert said.shape == (len(listed),)
    assert np.isfinite(said).all()
    mixed = random.permutation(len(listed))
    again = EVICTORS[name]().priorities(layers[mixed], experts[mixed], facts)
    assert again.tolist() == said[mixed].tolist()
    assert sorted(np.argsort(said, kind="stable").tolist()) == list(range(len(listed)))
