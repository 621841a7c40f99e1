"""Forecasters as tables, computed by hand: what prompts used, and what is said of the next."""

import numpy as np
import pytest

from retinue.errors import Refused, UsageError
from retinue.policy.predict.forecasters import LEARNED, NAMES, forecaster
from retinue.policy.predict.own_prefill import OwnPrefill
from retinue.policy.predict.previous_prompt import PreviousPrompt
from retinue.policy.predict.running_mean import RunningMean
from retinue.policy.predict.shares import blend, shares_of
from retinue.policy.predict.task_popularity import TaskPopularity
from retinue.policy.profile import Profile, TaskCounts

# Two layers of four experts; the second layer has none, as a dense one.
NONE = [0, 0, 0, 0]


def used(*row: float) -> np.ndarray:
    return np.array([row, NONE], dtype=np.float32)


def counts(*row: float) -> TaskCounts:
    return TaskCounts(1, 4, np.ones((2, 4), np.int64), used(*row))


KNOWN = Profile("by-hand", 2, 4, 1, {"a": counts(4, 3, 2, 1), "b": counts(0, 0, 0, 10)})
A, ALL = [0.4, 0.3, 0.2, 0.1], [0.2, 0.15, 0.1, 0.55]


def said(shares: np.ndarray) -> list[float]:
    """The first layer; the second has no experts, and nobody may say that it has."""
    assert shares.shape == (2, 4)
    assert not shares[1].any()
    return [round(value, 9) for value in shares[0].tolist()]


def test_shares_count_each_prompt_and_layer_alike() -> None:
    assert said(shares_of(used(2, 6, 0, 0))) == [0.25, 0.75, 0, 0]
    assert said(shares_of(used(20, 60, 0, 0))) == [0.25, 0.75, 0, 0]
    assert not shares_of(used(*NONE)).any()


def test_a_layer_that_knows_nothing_takes_the_prior() -> None:
    known, prior = shares_of(used(1, 0, 0, 0)), shares_of(used(0, 0, 0, 1))
    assert said(blend(known, prior, 0.25)) == [0.75, 0, 0, 0.25]
    assert said(blend(shares_of(used(*NONE)), prior, 0.25)) == [0, 0, 0, 1]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LEARNED])
def test_before_the_first_prompt_the_profile_decides(name: str) -> None:
    made = forecaster(name, KNOWN, None)
    assert said(made.shares("a")) == A
    for unknown in (None, "c"):
        assert said(made.shares(unknown)) == ALL


def test_popularity_never_changes() -> None:
    made = TaskPopularity(KNOWN)
    made.observe("a", used(0, 0, 0, 1))
    assert said(made.shares("a")) == A


def test_the_previous_prompt_counts_whatever_its_task() -> None:
    made = PreviousPrompt(KNOWN)
    made.observe("a", used(0, 0, 9, 0))
    made.observe("b", used(5, 5, 0, 0))
    assert said(made.shares("a")) == [0.499, 0.498, 0.002, 0.001]
    assert said(made.shares("b")) == [0.495, 0.495, 0, 0.01]


def test_a_running_mean_of_each_task() -> None:
    made = RunningMean(KNOWN, decay=0.5, prior_prompts=1.5)
    made.observe("a", used(0, 0, 0, 7))
    # one prompt against one and a half of the profile's
    assert said(made.shares("a")) == [0.24, 0.18, 0.12, 0.46]
    made.observe("a", used(0, 0, 2, 2))
    # prompts now weigh 1 and 0.5: together (0, 0, 0.5, 1) against 1.5 of the profile's
    assert said(made.shares("a")) == [0.2, 0.15, 0.266666667, 0.383333333]
    assert said(made.shares("b")) == [0, 0, 0, 1]
    made.observe(None, used(1, 0, 0, 0))
    assert said(made.shares(None)) == [0.52, 0.09, 0.06, 0.33]
    assert said(made.shares("b")) == [0, 0, 0, 1]


def test_a_decayed_mean_forgets() -> None:
    made = RunningMean(KNOWN, decay=0.5, prior_prompts=1)
    for _ in range(40):
        made.observe("a", used(1, 0, 0, 0))
    for _ in range(40):
        made.observe("a", used(0, 1, 0, 0))
    # all prompts together weigh two at most: the prior keeps a third
    assert said(made.shares("a")) == pytest.approx([0.4 / 3, 2.3 / 3, 0.2 / 3, 0.1 / 3], abs=1e-6)


@pytest.mark.parametrize("settings", [{"decay": 0}, {"decay": 1.1}, {"prior_prompts": 0}])
def test_settings_of_the_mean_have_bounds(settings: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match="must be"):
        RunningMean(KNOWN, **settings)


def test_the_own_prefill_speaks_of_the_answer_alone() -> None:
    made = OwnPrefill(KNOWN)
    assert said(made.own("a", used(0, 0, 1, 1))) == [0.12, 0.09, 0.41, 0.38]
    made.observe("a", used(0, 0, 1, 1))
    assert said(made.shares("a")) == A


def test_names() -> None:
    assert set(NAMES) == {
        *("popularity", "running-mean", "previous-prompt", "own-prefill"),
        *("emoe-a", "emoe-l"),
    }
    with pytest.raises(UsageError, match="unknown forecaster: `oracle`") as caught:
        forecaster("oracle", KNOWN, None)
    assert all(name in caught.value.hint for name in NAMES)


@pytest.mark.parametrize("name", LEARNED)
def test_what_was_never_learned_is_refused(name: str) -> None:
    with pytest.raises(Refused, match=f"`{name}` is learned") as caught:
        forecaster(name, KNOWN, None)
    assert "retinue train-predictor" in caught.value.hint
