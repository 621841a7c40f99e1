"""Which experts stay and who serves instead, as tables of facts and answers."""

import itertools
from typing import ClassVar

import numpy as np
import pytest

from disk import ids
from retinue.policy.base import Choice, Placement, Running, Stock
from retinue.policy.place.chance import Chance
from retinue.policy.place.emoe import Emoe, needs
from retinue.policy.place.even import even_rooms, most
from retinue.policy.place.marginal import marginal_split
from retinue.policy.place.popular import Popular, PopularByTask
from retinue.policy.policies import NoPlacement, OwnRouting
from retinue.policy.route.next_resident import NextResident

THERE = np.ones((2, 4), dtype=bool)
NONE = -np.inf
SPREAD = Emoe(marginal_split)


class Known:
    """Shares of two tasks in two layers of four experts."""

    TASKS: ClassVar = {
        "sql": [[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]],
        "json": [[0.0, 0.2, 0.2, 0.6], [0.7, 0.3, 0.0, 0.0]],
        None: [[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]],
    }

    def __init__(
        self, answers: float = 0.0, insensitive: dict[str | None, list[int]] | None = None
    ) -> None:
        self._answers, self._insensitive = answers, insensitive or {}

    def shares(self, task: str | None) -> np.ndarray:
        return np.array(self.TASKS.get(task, self.TASKS[None]))

    def sensitive(self, task: str | None) -> np.ndarray:
        return ~np.isin(np.arange(2), self._insensitive.get(task, []))

    def answer_tokens(self, task: str | None) -> float:
        return self._answers

    def damage(self) -> np.ndarray:
        return np.array([[1.0] * 4, [0.1] * 4])


def chosen(mask: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in mask]


def stock(slots: int, there: np.ndarray = THERE, resident: np.ndarray | None = None) -> Stock:
    return Stock(slots, 1, there, np.zeros_like(there) if resident is None else resident)


def running(*tasks: str | None) -> list[Running]:
    return [Running(task, prompt_tokens=10) for task in tasks]


@pytest.mark.parametrize(
    ("tasks", "slots", "experts"),
    [
        (["sql"], 4, [[0, 1], [2, 3]]),
        (["json"], 4, [[1, 3], [0, 1]]),  # of ties the first
        (["sql", "json"], 4, [[0, 3], [0, 1]]),
        (["sql", "sql", "json"], 4, [[0, 1], [0, 3]]),  # each request counts
        ([None], 3, [[0, 1], [0]]),
        (["poetry"], 3, [[0, 1], [0]]),
        ([], 3, [[0, 1], [0]]),
        (["sql"], 8, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_popular_by_task(tasks: list[str | None], slots: int, experts: list[list[int]]) -> None:
    assert chosen(PopularByTask().place(stock(slots), running(*tasks), Known())) == experts


def test_popular_does_not_ask_for_tasks() -> None:
    for tasks in (["sql"], ["json"], [None]):
        assert chosen(Popular().place(stock(3), running(*tasks), Known())) == [[0, 1], [0]]


@pytest.mark.parametrize("placement", [Popular(), PopularByTask(), Chance(), Emoe(), SPREAD])
def test_an_expert_that_does_not_exist_has_no_place(placement: Placement) -> None:
    there = np.array([[True, True, False, False], [False] * 4])
    assert chosen(placement.place(stock(4, there), running("json"), Known())) == [[0, 1], []]


def test_chance_is_seeded_and_even() -> None:
    all_there = stock(48, np.ones((3, 64), dtype=bool))
    first = Chance().place(all_there, running(None), Known())
    assert (first == Chance().place(all_there, running("sql"), Known())).all()
    assert (first != Chance(seed=1).place(all_there, running(None), Known())).any()
    assert first.sum(axis=1).tolist() == [16, 16, 16]
    drawn = sum(Chance(seed).place(all_there, [], Known()) for seed in range(200))
    assert drawn.min() > 20  # 50 expected of each
    assert drawn.max() < 85


def test_most_takes_the_highest_and_of_ties_what_is_there() -> None:
    scores = np.array([[0.0, 0.2, 0.2, 0.6], [0.7, 0.3, 0.0, 0.0]])
    assert chosen(most(scores, ids(1, 3), THERE)) == [[3], [0, 1, 2]]
    resident = np.array([[False, False, True, False], [False, False, False, True]])
    assert chosen(most(scores, ids(2, 3), THERE, resident)) == [[2, 3], [0, 1, 3]]


def test_the_score_of_emoe_by_hand() -> None:
    """(sum of W_j + T W_o) s f, per task, then summed: 2 x sql, 1 x json; json is insensitive

    in layer 1. sql: 30 + 10 prompt tokens and 2 x 20 of answers: 80. json: 50 and 5 (the request
    allows no more, where the mean is 20): 55.
    """
    together = [Running("sql", 30, 100), Running("sql", 10), Running("json", 50, 5)]
    scores = needs(together, Known(answers=20.0, insensitive={"json": [1]}), (2, 4))
    sql, json = Known.TASKS["sql"], Known.TASKS["json"]
    assert scores[0] == pytest.approx(
        [80 * s + 55 * j for s, j in zip(sql[0], json[0], strict=True)]
    )
    assert scores[1] == pytest.approx([80 * s for s in sql[1]])
    # 40, 35, 27, 33 in layer 0; 8, 16, 24, 32 in layer 1.
    known = Known(answers=20.0, insensitive={"json": [1]})
    assert chosen(Emoe().place(stock(4), together, known)) == [[0, 1], [2, 3]]
    assert chosen(SPREAD.place(stock(5), together, known)) == [[0, 1, 2, 3], [3]]


def test_a_layer_that_does_not_matter_to_a_task_keeps_its_set() -> None:
    resident = np.array([[True, True, False, False], [False, False, True, True]])
    known = Known(insensitive={"json": [0]})
    for placement in (Emoe(), SPREAD):
        placed = placement.place(stock(4, resident=resident), running("json"), known)
        assert chosen(placed) == [[0, 1], [0, 1]]
    known = Known(insensitive={"json": [0, 1]})
    assert (Emoe().place(stock(4, resident=resident), running("json"), known) == resident).all()
    # Nothing is there yet: popularity over all tasks.
    assert chosen(Emoe().place(stock(2), running("json"), known)) == [[0], [0]]


def test_an_exchange_has_to_be_worth_its_read() -> None:
    resident = np.array([[True, True, False, False], [True, True, False, False]])
    held = stock(4, resident=resident)
    # 10 tokens of json. Layer 0 wants 3 (6 tokens' weight, and 0 for the one that leaves) and is
    # tied between 1 and 2; layer 1 has what it wants.
    assert chosen(Emoe().place(held, running("json"), Known())) == [[1, 3], [0, 1]]
    assert chosen(Emoe(worth=5.9).place(held, running("json"), Known())) == [[1, 3], [0, 1]]
    assert chosen(Emoe(worth=6.1).place(held, running("json"), Known())) == [[0, 1], [0, 1]]
    # Ten times the tokens, ten times the gain.
    many = running(*["json"] * 10)
    assert chosen(Emoe(worth=6.1).place(held, many, Known())) == [[1, 3], [0, 1]]


def test_slots_go_where_wrong_routing_hurts() -> None:
    tasks = running("json")
    assert chosen(SPREAD.place(stock(4), tasks, Known())) == [[1, 3], [0, 1]]
    weighed = Emoe(marginal_split, weigh=True)
    assert chosen(weighed.place(stock(4), tasks, Known())) == [[1, 2, 3], [0]]


def test_the_marginal_split_serves_as_much_as_any_other() -> None:
    """Against every set of 5 of 8 with at least one expert in each layer."""
    scores = np.random.default_rng(3).random((2, 4))
    best = 0.0
    for picks in itertools.combinations(range(8), 5):
        mask = np.zeros(8, dtype=bool)
        mask[list(picks)] = True
        if mask.reshape(2, 4).any(axis=1).all():
            best = max(best, float(scores.ravel()[mask].sum()))
    assert scores[marginal_split(scores, stock(5))].sum() == pytest.approx(best)


def test_the_marginal_split_leaves_each_layer_what_a_token_needs() -> None:
    scores = np.array([[9.0, 8.0, 7.0, 6.0], [0.1, 0.2, 0.3, 0.4]])
    held = Stock(5, 2, THERE, np.zeros_like(THERE))
    assert chosen(marginal_split(scores, held)) == [[0, 1, 2], [2, 3]]


@pytest.mark.parametrize(
    ("slots", "counts", "rooms"),
    [
        (8, [4, 4], [4, 4]),
        (5, [4, 4], [3, 2]),
        (5, [4, 0, 4, 0], [3, 0, 2, 0]),
        (9, [4, 4], [4, 4]),
        (7, [2, 4, 4], [2, 2, 2]),
    ],
)
def test_even_rooms(slots: int, counts: list[int], rooms: list[int]) -> None:
    there = np.arange(4) < np.array(counts)[:, None]
    assert even_rooms(slots, there).tolist() == rooms


def ranks(scores: list[float], experts: list[int], resident: list[int]) -> list[float] | None:
    there = np.zeros((1, len(scores)), dtype=bool)
    there[0, resident] = True
    weights = np.ones((1, len(experts)), dtype=np.float32)
    choice = Choice(0, np.array([scores], dtype=np.float32), np.array([experts]), weights)
    ranking = NextResident().rank(choice, there)
    return None if ranking is None else ranking[0].tolist()


@pytest.mark.parametrize(
    ("scores", "experts", "resident", "first"),
    [
        ([0.4, 0.3, 0.2, 0.1], [0, 1], [0, 2, 3], [0, 2]),
        ([0.4, 0.3, 0.2, 0.1], [0, 1], [3, 2], [2, 3]),
        ([-0.4, -0.3, -0.2, -0.9], [2, 1], [3, 0], [0, 3]),
        # Ruled out by the family, but resident: after every other resident, before the absent.
        ([0.4, NONE, 0.2, NONE], [0, 2], [1, 2], [2, 1]),
        # Of equal scores, what the router itself chose.
        ([0.2, 0.2, 0.2, 0.9], [3, 2], [0, 1, 2], [2, 0]),
    ],
)
def test_next_resident(
    scores: list[float], experts: list[int], resident: list[int], first: list[int]
) -> None:
    ranking = ranks(scores, experts, resident)
    assert ranking is not None
    assert np.argsort(-np.array(ranking), kind="stable")[:2].tolist() == first
    absent = set(range(4)) - set(resident)
    assert all(ranking[expert] == NONE for expert in absent)
    assert all(ranking[expert] > NONE for expert in resident)


def test_nothing_changes_where_the_chosen_are_resident() -> None:
    assert ranks([0.4, 0.3, 0.2, 0.1], [0, 1], [0, 1, 3]) is None


def test_null_objects_change_nothing() -> None:
    scores, weights = np.ones((1, 4), np.float32), np.ones((1, 2), np.float32)
    choice = Choice(0, scores, np.array([[0, 1]]), weights)
    assert OwnRouting().rank(choice, np.zeros((1, 4), dtype=bool)) is None
    assert not NoPlacement().place(stock(8), [], Known()).any()
