"""Roads by hand: side by side, in turn, and what they have in common."""

from math import inf

import pytest

from retinue.sim.disk import InTurn, Road, SideBySide


def ends(road: Road[str]) -> list[tuple[str, float]]:
    """Who is through when, in that order."""
    found = []
    while (due := road.due()) < inf:
        found.append((road.leave(), due))
    return found


def test_side_by_side_those_that_begin_together_end_together() -> None:
    road = SideBySide[str](2.0)
    for name in "abc":
        road.enter(1.0, 4, name)
    assert ends(road) == [("a", 7.0), ("b", 7.0), ("c", 7.0)]
    road.enter(20.0, 4, "d")
    assert ends(road) == [("d", 22.0)], "alone it has all of it"


def test_side_by_side_who_comes_later_slows_the_others_from_then_on() -> None:
    road = SideBySide[str](1.0)
    road.enter(0.0, 4, "long")
    road.enter(2.0, 1, "short")
    assert road.due() == 4.0, "2 bytes are left of one, 1 of the other, each at half the speed"
    assert ends(road) == [("short", 4.0), ("long", 5.0)]


def test_what_arrives_after_the_next_end_does_not_count_yet() -> None:
    road = SideBySide[str](1.0)
    road.enter(0.0, 2, "early")
    road.enter(3.0, 2, "late")
    assert road.due() == 2.0
    assert ends(road) == [("early", 2.0), ("late", 5.0)]


def test_in_turn_each_waits_for_all_before() -> None:
    road = InTurn[str](2.0)
    road.enter(1.0, 4, "a")
    road.enter(1.0, 2, "b")
    road.enter(9.0, 2, "c")
    assert ends(road) == [("a", 3.0), ("b", 4.0), ("c", 10.0)]


@pytest.mark.parametrize("kind", [SideBySide, InTurn])
def test_all_bytes_take_as_long_either_way(kind: type[SideBySide[str]]) -> None:
    road = kind(3.0)
    arrivals = [(0.0, 5), (0.1, 1), (0.1, 9), (0.2, 3)]
    for at, size in arrivals:
        road.enter(at, size, str(size))
    found = ends(road)
    assert sorted(name for name, _ in found) == ["1", "3", "5", "9"]
    assert found[-1][1] == pytest.approx(6.0)
    assert road.due() == inf
