"""What passes cost and how long answers get, learnt from what ran."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import Waiting, decoding
from retinue.metrics import PhaseCounters
from retinue.policy.costs import LEAST, CostModel, FadingLine, Lengths
from retinue.policy.measured import MachineCosts


@given(st.floats(0, 10), st.floats(0, 1), st.integers(2, 50))
def test_a_line_is_found(base: float, slope: float, step: int) -> None:
    line = FadingLine()
    for x in range(1, 40):
        line.observe(x * step, base + slope * x * step)
    assert line.at(7 * step) == pytest.approx(base + slope * 7 * step, rel=1e-3, abs=1e-3)


def test_a_line_says_nothing_at_first() -> None:
    line = FadingLine()
    for count in range(1, 20):
        line.observe(count, 1.0)
        assert line.known == (count >= LEAST + 2), count  # the first ones have faded a little


def test_a_line_never_falls_and_never_begins_below_zero() -> None:
    falling, steep = FadingLine(), FadingLine()
    for x in range(1, 20):
        falling.observe(x, 30.0 - x)
        steep.observe(x, max(0.0, 5.0 * x - 20))
    assert falling.parts[1] == 0.0
    assert 10 < falling.at(100) < 30
    assert steep.parts[0] == 0.0


def test_always_the_same_number_of_tokens_costs_in_proportion() -> None:
    line = FadingLine()
    for _ in range(10):
        line.observe(8, 4.0)
    assert line.at(16) == pytest.approx(8.0)


def test_one_outlier_moves_a_line_a_little() -> None:
    line = FadingLine()
    for x in range(1, 30):
        line.observe(x, 1.0)
    line.observe(10, 1000.0)
    assert line.at(10) < 1.2


def test_a_line_follows_when_the_machine_changes() -> None:
    line = FadingLine()
    for seconds in (1.0, 5.0):
        for at in range(100):
            line.observe(1 + at % 10, seconds)
    assert line.at(5) == pytest.approx(5.0, rel=0.1)


def test_what_a_profile_measured_is_known_at_once_and_fades() -> None:
    costs = CostModel()
    assert not costs.known
    costs.take_over(MachineCosts(base_s=0.5, token_s=0.01, load_base_s=0.1, load_s=0.02))
    assert costs.known
    assert costs.decode.at(10) == pytest.approx(0.6)
    assert costs.load.at(5) == pytest.approx(0.2)
    for at in range(200):
        costs.observe("decode", PhaseCounters(tokens=1 + at % 8, seconds=1.0))
    assert costs.decode.at(10) == pytest.approx(1.0, rel=0.02)


def test_misses_are_priced_at_what_they_were_waited_for() -> None:
    costs = CostModel()
    for misses in range(1, 20):
        cost = PhaseCounters(tokens=1, seconds=9.0, misses=misses, stall_s=0.5 + 0.25 * misses)
        costs.observe("decode", cost)
    assert costs.load.parts == (pytest.approx(0.5), pytest.approx(0.25))


def test_prompts_take_as_many_passes_as_they_have_chunks() -> None:
    costs = CostModel()
    costs.take_over(MachineCosts(base_s=1.0, token_s=0.01, load_base_s=0, load_s=0))
    assert costs.prompts(400, 200) == pytest.approx(2 + 4.0)
    assert costs.prompts(401, 200) == pytest.approx(3 + 4.01)
    assert costs.prompts(0, 200) == 0.0


def test_an_answer_is_as_long_as_those_of_its_task() -> None:
    lengths = Lengths({"known": 4.0}.get)
    assert lengths.whole(Waiting("other")) == 10  # the longest that was asked for
    lengths.observe("seen", 2)
    lengths.observe("seen", 4)
    assert lengths.whole(Waiting("seen")) == pytest.approx(3.0, abs=0.01)
    assert lengths.whole(Waiting("other")) == pytest.approx(3.0, abs=0.01)  # as all together
    assert lengths.whole(Waiting("known")) == 4.0
    assert lengths.whole(Waiting("known", longest=2)) == 2
    for _ in range(500):
        lengths.observe("known", 8)
    assert lengths.whole(Waiting("known")) == pytest.approx(8.0, abs=0.1)


@pytest.mark.parametrize(
    ("answered", "left"),
    # 5 % of 100 are 5, which begin anew each time.
    [(0, 100), (40, 60), (99, 1), (100, 5), (103, 2), (105, 5), (199, 1)],
)
def test_what_is_left_of_an_answer(answered: int, left: float) -> None:
    lengths = Lengths({"a": 100.0}.get)
    assert lengths.left(decoding(answered, task="a", longest=200)) == left
