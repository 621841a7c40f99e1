"""How many sequences decode together, by hand: from the routing alone."""

import pytest

from retinue.metrics import PhaseCounters
from retinue.policy.order.cohort import LOOK_STEPS, STAY_STEPS, Cohort

# Four layers of eight experts, two a token: one token uses 2 of a layer, two 3.5, three 4.6.
LAYERS, EXPERTS, TOP_K = 4, 8, 2


def make(slots: int) -> Cohort:
    return Cohort(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, slots=slots)


def look(cohort: Cohort, ready: int, *, repeated: int, steps: int = LOOK_STEPS) -> None:
    """Passes in which, of eight experts each, `repeated` had been used just before."""
    for _ in range(steps):
        cohort.observe(
            PhaseCounters(hits=5, misses=3, repeated=repeated), cohort.size(ready), ready
        )


@pytest.mark.parametrize(
    ("slots", "fitting"), [(8, 1), (13, 1), (14, 2), (18, 2), (19, 3), (31, 12)]
)
def test_as_many_fit_as_find_room_for_their_experts(slots: int, fitting: int) -> None:
    cohort = make(slots)
    assert cohort.fitting == fitting
    assert [cohort.size(ready) for ready in (1, fitting, fitting + 1)] == [1, fitting, fitting]


def test_all_run_where_every_expert_is_in_memory() -> None:
    assert make(LAYERS * EXPERTS).size(1000) == 1000


def test_all_run_for_a_while_where_tokens_repeat_nothing() -> None:
    """Then nothing is lost with what had to leave, and much is shared."""
    cohort = make(14)
    look(cohort, 6, repeated=0, steps=LOOK_STEPS - 1)
    assert cohort.size(6) == 2
    look(cohort, 6, repeated=0, steps=1)
    assert cohort.size(6) == 6
    look(cohort, 6, repeated=0, steps=STAY_STEPS - 1)
    assert cohort.size(6) == 6
    look(cohort, 6, repeated=0, steps=1)
    assert cohort.size(6) == 2


def test_few_go_on_where_tokens_come_back_to_their_experts() -> None:
    cohort = make(14)
    look(cohort, 6, repeated=8, steps=5 * LOOK_STEPS)
    assert cohort.size(6) == 2


def test_passes_of_another_size_say_nothing() -> None:
    cohort = make(14)
    for _ in range(5 * LOOK_STEPS):
        cohort.observe(PhaseCounters(hits=8), 1, 1)
        cohort.observe(PhaseCounters(hits=8), 2, 2)
    assert cohort.size(6) == 2
