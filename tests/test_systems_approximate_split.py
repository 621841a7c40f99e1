"""AdapMoE's split of the cache over layers: its equation, and the best of all splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disk import STEADY
from retinue.policy.place.dynamic_split import expected_rooms, reads_on_demand, split_slots
from routes import GIVEN, learned


@pytest.mark.parametrize("size", range(9))
@pytest.mark.parametrize(("single", "accuracy"), [(0.0, 0.0), (0.3, 0.566), (1.0, 0.9)])
def test_reads_on_demand_are_those_of_the_paper(size: int, single: float, accuracy: float) -> None:
    """AdapMoE's f for eight experts and top 2."""
    r, a, s = single, accuracy, size
    both, one = (8 - s) * (7 - s) / 56, 2 * (8 - s) * s / 56
    paper = r * (1 - s / 8) * (1 - a)
    paper += (1 - r) * (2 * both * (1 - a) + both * a + one * (1 - a))
    assert reads_on_demand(8, a, [r, 1 - r])[s] == pytest.approx(paper)


@STEADY
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_the_split_is_the_best_of_all(layers: int, experts: int, slots: int, seed: int) -> None:
    costs = np.random.default_rng(seed).random((layers, experts + 1))
    sizes = split_slots(costs, slots, least=1)
    count = min(slots, layers * experts)
    assert sizes.sum() == count
    assert (sizes <= experts).all()
    assert (sizes >= min(1, count // layers)).all()
    found = sum(costs[layer, size] for layer, size in enumerate(sizes.tolist()))

    def least(layer: int, left: int) -> float:
        if layer == layers:
            return 0.0 if left == 0 else np.inf
        low = min(1, count // layers)
        return (
            min(
                costs[layer, size] + least(layer + 1, left - size)
                for size in range(low, experts + 1)
                if size <= left
            )
            if left >= low
            else np.inf
        )

    assert found == pytest.approx(least(0, count))


def test_slots_go_to_layers_that_predict_badly() -> None:
    rooms = expected_rooms(learned()["adapmoe"], GIVEN)
    assert rooms.sum() == GIVEN.slots
    assert rooms[0] == rooms.max()
    assert rooms.min() >= GIVEN.top_k
