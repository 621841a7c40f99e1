"""Forecasters as tables, computed by hand: what prompts used, and what is said of the next."""

import numpy as np
import pytest

from retinue.errors import Refused, UsageError
from retinue.policy.predict.emoe_all import EmoeAll
from retinue.policy.predict.emoe_layerwise import EmoeLayerwise
from retinue.policy.predict.forecasters import LEARNED, NAMES, forecaster
from retinue.policy.predict.learned import Learned
from retinue.policy.predict.network import Network, shapes
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
    made = RunningMean(KNOWN, decay=0.5)
    made.observe("a", used(0, 0, 0, 7))
    # one prompt against eight of the profile's
    assert said(made.shares("a")) == pytest.approx([3.2 / 9, 2.4 / 9, 1.6 / 9, 1.8 / 9])
    made.observe("a", used(0, 0, 2, 2))
    # prompts now weigh 1 and 0.5: together (0, 0, 0.5, 1) against eight of the profile's
    expected = [3.2 / 9.5, 2.4 / 9.5, 2.1 / 9.5, 1.8 / 9.5]
    assert said(made.shares("a")) == pytest.approx(expected)
    assert said(made.shares("b")) == [0, 0, 0, 1]


@pytest.mark.parametrize("task", [None, "c"])
def test_a_task_that_the_profile_does_not_know_leaves_it_soon(task: str | None) -> None:
    made = RunningMean(KNOWN)
    made.observe(task, used(1, 0, 0, 0))
    # one prompt against one of the profile's
    assert said(made.shares(task)) == [0.6, 0.075, 0.05, 0.275]
    assert said(made.shares("b")) == [0, 0, 0, 1]


def test_a_decayed_mean_forgets() -> None:
    made = RunningMean(KNOWN, decay=0.5)
    for _ in range(40):
        made.observe("a", used(1, 0, 0, 0))
    for _ in range(40):
        made.observe("a", used(0, 1, 0, 0))
    # all prompts together weigh two at most: the profile keeps four fifths
    assert said(made.shares("a")) == pytest.approx([0.32, 0.44, 0.16, 0.08], abs=1e-6)


@pytest.mark.parametrize("decay", [0, 1.1])
def test_the_decay_has_bounds(decay: float) -> None:
    with pytest.raises(AssertionError, match="over 0, and 1 at most"):
        RunningMean(KNOWN, decay)


def test_the_own_prefill_speaks_of_the_answer_alone() -> None:
    made = OwnPrefill(KNOWN)
    assert said(made.own("a", used(0, 0, 1, 1))) == [0.12, 0.09, 0.41, 0.38]
    assert said(made.shares("a")) == A
    made.observe("a", used(0, 0, 1, 1))
    assert said(made.shares("a")) == pytest.approx([3.2 / 9, 2.4 / 9, 2.1 / 9, 1.3 / 9])


def network(layerwise: bool, **changed: np.ndarray) -> Network:
    """Of one layer with four experts that says what the profile says, but for what is changed."""
    made = {name: np.zeros(shape) for name, shape in shapes(1, 4, 1, 4, 0).items()}
    return Network(made | changed, layerwise)


def learned(rows: list[int], **networks: Network) -> Learned:
    named = {name.replace("_", "-"): value for name, value in networks.items()}
    return Learned("by-hand", 2, 4, 1, np.array(rows), ("a",), 9, {}, named)


def test_emoe_a_by_hand() -> None:
    # Expert 2 is expected after expert 1, and expert 3 for the task `a`.
    read, say, task = np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), np.zeros((2, 4))
    read[0, 1, 0] = task[0, 1] = 1
    say[0, 0, 2] = say[0, 1, 3] = 10
    made = EmoeAll(KNOWN, learned([0], emoe_a=network(False, read=read, say=say, task=task)))
    assert said(made.shares("a")) == A
    made.observe("b", used(0, 5, 0, 0))
    assert said(made.shares("b"))[2] > 0.95
    assert made.shares("a")[0, 2:].sum() > 0.99
    made.observe("b", used(5, 0, 0, 0))
    assert made.shares("a")[0, 3] > 0.99
    # Nothing is expected after expert 0: the mean stays, of two prompts and eight of the profile's.
    assert made.shares("b")[0, 3] == pytest.approx(0.8, abs=2e-3)
    assert not made.shares("b")[1].any()


def test_emoe_l_copies_the_first_layer_of_the_task_and_says_the_next_from_it() -> None:
    both = {"a": counts(1, 1, 1, 1)}
    both["a"].weight[1] = 1
    read, say = np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    read[1] = np.eye(4)  # the second position reads the first layer's experts
    say[1] = 10 * np.roll(np.eye(4), 1, axis=1)  # and expects their neighbours
    arrays = {name: np.zeros(shape) for name, shape in shapes(2, 4, 1, 4, 0).items()}
    made = EmoeLayerwise(
        Profile("by-hand", 2, 4, 1, both),
        learned([0, 1], emoe_l=Network(arrays | {"read": read, "say": say}, True)),
    )
    assert made.shares("a").tolist() == [[0.25] * 4] * 2
    seen = np.array([[0, 3, 0, 0], [9, 9, 9, 9]], dtype=np.float32)
    made.observe("a", seen)
    made.observe("b", seen[:, ::-1])  # another task's prompt changes nothing
    shares = made.shares("a")
    assert shares[0].tolist() == [0, 1, 0, 0]
    assert shares[1, 2] > 0.99


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
    others = learned([0], **{other: network(False) for other in LEARNED if other != name})
    for made in (None, others):
        with pytest.raises(Refused, match=f"`{name}` has to be trained") as caught:
            forecaster(name, KNOWN, made)
        assert f"retinue train-predictor MODEL --data FILE --kind {name}" in caught.value.hint
        assert caught.value.exit_code == 3
