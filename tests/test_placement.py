"""Which experts stay and who serves instead, as tables of facts and answers."""

from typing import ClassVar

import numpy as np
import pytest

from disk import ids
from retinue.policy.base import Choice, NoPlacement, OwnRouting
from retinue.policy.place.chance import Chance
from retinue.policy.place.even import even_rooms
from retinue.policy.place.popular import Popular, PopularByTask
from retinue.policy.route.next_resident import NextResident

THERE = np.ones((2, 4), dtype=bool)
NONE = -np.inf


class Known:
    """Shares of two tasks in two layers of four experts."""

    TASKS: ClassVar = {
        "sql": [[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]],
        "json": [[0.0, 0.2, 0.2, 0.6], [0.7, 0.3, 0.0, 0.0]],
        None: [[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]],
    }

    def shares(self, task: str | None) -> np.ndarray:
        return np.array(self.TASKS.get(task, self.TASKS[None]))


def chosen(mask: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in mask]


@pytest.mark.parametrize(
    ("tasks", "rooms", "experts"),
    [
        (["sql"], (2, 2), [[0, 1], [2, 3]]),
        (["json"], (2, 2), [[1, 3], [0, 1]]),
        (["json"], (1, 3), [[3], [0, 1, 2]]),  # of ties the first
        (["sql", "json"], (2, 2), [[0, 3], [0, 1]]),
        (["sql", "sql", "json"], (2, 2), [[0, 1], [0, 3]]),  # each request counts
        ([None], (1, 2), [[0], [0, 1]]),
        (["poetry"], (1, 2), [[0], [0, 1]]),
        ([], (1, 2), [[0], [0, 1]]),
        (["sql"], (4, 0), [[0, 1, 2, 3], []]),
    ],
)
def test_popular_by_task(
    tasks: list[str | None], rooms: tuple[int, int], experts: list[list[int]]
) -> None:
    assert chosen(PopularByTask().place(ids(*rooms), THERE, tasks, Known())) == experts


def test_popular_does_not_ask_for_tasks() -> None:
    for tasks in (["sql"], ["json"], [None]):
        assert chosen(Popular().place(ids(1, 3), THERE, tasks, Known())) == [[0], [0, 1, 2]]


def test_an_expert_that_does_not_exist_has_no_place() -> None:
    there = np.array([[True, True, False, False], [False] * 4])
    for placement in (Popular(), PopularByTask(), Chance()):
        assert chosen(placement.place(ids(4, 0), there, ["json"], Known())) == [[0, 1], []]


def test_chance_is_seeded_and_even() -> None:
    there, rooms = np.ones((3, 64), dtype=bool), ids(16, 16, 16)
    first = Chance().place(rooms, there, [None], Known())
    assert (first == Chance().place(rooms, there, ["sql"], Known())).all()
    assert (first != Chance(seed=1).place(rooms, there, [None], Known())).any()
    assert first.sum(axis=1).tolist() == [16, 16, 16]
    drawn = sum(Chance(seed).place(rooms, there, [None], Known()) for seed in range(200))
    assert drawn.min() > 20  # 50 expected of each
    assert drawn.max() < 85


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
    assert not NoPlacement().place(ids(4, 4), THERE, [None], Known()).any()
