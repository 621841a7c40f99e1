"""When a resident set is chosen anew, and by which forecast: with a cache that only notes it."""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retinue.config import Config
from retinue.engine.residents import Beforehand, Residents, residents_of
from retinue.errors import ReadError
from retinue.metrics import Metrics
from retinue.policy.base import Forecaster, Placement, Running
from retinue.policy.place.emoe import Emoe
from retinue.policy.place.occasions import Occasions
from retinue.policy.place.popular import Popular, PopularByTask
from retinue.policy.place.rhythm import Drift, Rhythm
from retinue.policy.place.tables import Tables
from retinue.policy.predict.own_prefill import OwnPrefill
from retinue.policy.preset import Given
from retinue.policy.presets import preset
from retinue.policy.profile import Profile, TaskCounts

SHAPE = (2, 6)
SLOTS, BYTES = 4, 100


class Cache:
    """Two slots a layer; a read moves `BYTES`."""

    slots, top_k = SLOTS, 1

    def __init__(self) -> None:
        self.slot_of = np.full(SHAPE, -1)
        self.broken = False

    def place(self, wanted: np.ndarray, popularity: np.ndarray) -> int:
        assert popularity.shape == SHAPE
        if self.broken:
            raise ReadError("the disk is gone")
        read = np.count_nonzero(wanted & (self.slot_of < 0))
        self.slot_of = np.where(wanted, 0, -1)
        return int(read) * BYTES

    @property
    def sets(self) -> list[list[int]]:
        return [np.flatnonzero(row >= 0).tolist() for row in self.slot_of]


class Forecast:
    """Says of each task what `now` says, and notes what it was asked and told."""

    def __init__(self) -> None:
        self.now: dict[str | None, tuple[int, int]] = {}
        self.asked: list[str | None] = []
        self.told: list[tuple[str | None, np.ndarray]] = []

    def shares(self, task: str | None) -> np.ndarray:
        self.asked.append(task)
        return shares(*self.now.get(task, (4, 5)))

    def observe(self, task: str | None, used: np.ndarray) -> None:
        self.told.append((task, used))


def shares(first: int, second: int) -> np.ndarray:
    table = np.zeros(SHAPE)
    table[:, first], table[:, second] = 0.6, 0.4
    return table


def profile(tasks: Iterable[str] = ("sql", "json")) -> Profile:
    counts = TaskCounts(1, 10, np.zeros(SHAPE, np.int64), shares(4, 5).astype(np.float32))
    return Profile("tiny", *SHAPE, 1, dict.fromkeys(tasks, counts))


class Rig:
    """Residents over a noted cache; `begin` names the tasks that run, new ones with a `+`."""

    def __init__(
        self,
        placement: Placement,
        period: int = 3,
        forecast: Forecaster | None = None,
        *,
        impatient: bool = False,
        keeps: bool = False,
    ) -> None:
        self.cache, self.metrics, self.forecast = Cache(), Metrics(), Forecast()
        self.expected: list[np.ndarray] = []  # what kept sets were told
        self.forecast.now = {"sql": (0, 1), "json": (2, 3)}
        self.host: Any = SimpleNamespace(
            cache=self.cache,
            metrics=self.metrics,
            changes=SimpleNamespace(
                active=False,
                books=SimpleNamespace(
                    there=lambda: self.cache.slot_of >= 0, expect=self.expected.append
                ),
            ),
            arrival=SimpleNamespace(place=self.cache.place, settle=lambda: None),
        )
        tables = Tables(SHAPE, profile(), forecast or self.forecast)
        there = np.ones(SHAPE, dtype=bool)
        rhythm = Rhythm(period, impatient=impatient)
        occasions = Occasions(placement, tables, rhythm, keeps=keeps)
        self.residents = Residents(self.host, placement, tables, there, occasions)
        self.residents.start(None)

    def begin(self, *tasks: str) -> int:
        return self.residents.begin(
            [Running(task.strip("+"), 10, 10, new="+" in task) for task in tasks]
        )


def test_it_starts_within_the_budget_and_serves_at_once() -> None:
    rig = Rig(Emoe())
    assert rig.cache.sets == [[4, 5], [4, 5]]
    assert rig.host.changes.active
    assert rig.host.begin == rig.residents.begin
    assert (rig.metrics.refreshes, rig.metrics.refresh_bytes) == (0, 0)  # that was loading


def test_tables_are_kept_for_a_period_and_new_tasks_are_placed_by_them() -> None:
    rig = Rig(Emoe(), period=3)
    rig.begin("sql+")
    assert rig.cache.sets == [[0, 1]] * 2
    rig.forecast.now = {"sql": (1, 2), "json": (3, 4)}
    rig.begin("json+")  # asked for the first time only now
    assert rig.cache.sets == [[3, 4]] * 2
    rig.begin("sql+")
    assert rig.cache.sets == [[0, 1]] * 2  # the table of before
    asked = rig.forecast.asked.count("sql")
    rig.begin("sql")  # no other prompt: the third one still runs
    assert rig.cache.sets == [[0, 1]] * 2
    rig.begin("sql+")  # the fourth
    assert rig.cache.sets == [[1, 2]] * 2
    assert rig.forecast.asked.count("sql") == asked + 1


def test_each_prompt_counts_once_and_together_with_others() -> None:
    rig = Rig(Emoe(), period=4)
    rig.begin("sql+", "sql+", "sql+")
    rig.forecast.now = {"sql": (1, 2)}
    for _ in range(5):
        rig.begin("sql", "sql", "sql")
    rig.begin("sql", "sql+")
    assert rig.cache.sets == [[0, 1]] * 2  # three were before it
    rig.begin("sql", "sql+")
    assert rig.cache.sets == [[1, 2]] * 2


def test_only_the_difference_is_read_and_it_is_counted() -> None:
    rig = Rig(Emoe(), period=1)
    assert rig.begin("sql+") == 4 * BYTES
    rig.forecast.now = {"sql": (1, 2)}
    assert rig.begin("sql") == 0
    assert rig.begin("sql+") == 2 * BYTES
    assert rig.begin("sql") == 0
    metrics = rig.metrics
    assert (metrics.refreshes, metrics.refresh_bytes) == (2, 6 * BYTES)
    assert metrics.refresh_s > 0
    assert rig.residents.bytes_read == 10 * BYTES  # with the first set


def test_requests_of_two_tasks_share_by_their_tokens() -> None:
    rig = Rig(Emoe())
    rig.begin("sql+", "json+")
    assert rig.cache.sets == [[0, 2]] * 2
    rig.begin("sql", "json", "json+")
    assert rig.cache.sets == [[2, 3]] * 2
    read = rig.residents.bytes_read
    rig.begin("json", "json", "sql")  # the same, in another order
    assert rig.residents.bytes_read == read


def test_the_forecaster_is_told_what_a_prompt_used() -> None:
    rig = Rig(Emoe())
    used = np.ones(SHAPE, dtype=np.float32)
    rig.host.observe("sql", used)
    ((task, told),) = rig.forecast.told
    assert task == "sql"
    assert told is used


def test_the_own_prefill_places_each_answer_and_forgets_it_with_the_next_prompt() -> None:
    rig = Rig(Emoe(), forecast=OwnPrefill(profile()))
    rig.begin("sql+")
    assert rig.cache.sets == [[4, 5]] * 2
    rig.host.observe("sql", used(0, 1))
    rig.begin("sql")
    assert rig.cache.sets == [[0, 1]] * 2
    read = rig.residents.bytes_read
    rig.begin("sql")
    assert rig.residents.bytes_read == read
    rig.begin("sql+")  # is read with the mean again, half of it the profile's: 0.3, 0.2
    assert rig.cache.sets == [[0, 4]] * 2


def test_a_set_that_never_changes_is_never_chosen_anew() -> None:
    rig = Rig(Popular(), period=1)
    for _ in range(3):
        assert rig.begin("sql+") == 0
    assert rig.metrics.refreshes == 0


def test_a_set_by_task_alone_knows_no_period() -> None:
    rig = Rig(PopularByTask(), period=1)
    rig.begin("sql+")
    rig.forecast.now = {"sql": (1, 2)}
    rig.begin("sql+")
    assert rig.cache.sets == [[0, 1]] * 2


def test_a_refresh_that_failed_is_tried_again() -> None:
    rig = Rig(Emoe())
    rig.cache.broken = True
    with pytest.raises(ReadError):
        rig.begin("sql+")
    rig.cache.broken = False
    rig.begin("sql+")
    assert rig.cache.sets == [[0, 1]] * 2


def test_a_set_that_is_kept_waits_for_the_next_forecast_and_reads_nothing_before() -> None:
    rig = Rig(Emoe(), period=2, keeps=True)
    assert rig.begin("sql+") == rig.begin("sql+", "json") == 0
    assert rig.cache.sets == [[4, 5]] * 2  # the first one
    assert rig.metrics.refreshes == 0
    for told, mean in zip(rig.expected, ([0.6, 0.4, 0, 0], [0.3, 0.2, 0.3, 0.2]), strict=True):
        assert told[:, :4] == pytest.approx(np.array([mean] * 2))
    rig.begin("json+")
    assert rig.cache.sets == [[2, 3]] * 2
    rig.begin("json")  # nothing is new
    assert len(rig.expected) == 3 - 1
    rig.begin("sql")
    assert rig.cache.sets == [[2, 3]] * 2
    assert rig.metrics.refreshes == 1


def test_a_set_that_is_kept_is_loaded_again_where_it_was_lost() -> None:
    rig = Rig(Emoe(), keeps=True)
    with rig.residents.away():
        pass
    rig.begin("sql")
    assert rig.cache.sets == [[0, 1]] * 2
    assert not rig.expected


@pytest.mark.parametrize(
    ("name", "above", "kept"),
    [("emoe-fetch", 0.25, True), ("emoe-fetch", 0.9, False), ("emoe", 0.25, False)],
)
def test_sets_are_kept_where_fetching_mends_them_and_a_forecast_comes_soon(
    name: str, above: float, kept: bool
) -> None:
    rig = Rig(Emoe())
    policies = replace(preset(name).build(Given()), fetch_above=above)
    known = Beforehand(profile(), rig.forecast)
    residents = residents_of(rig.host, policies, known, np.ones(SHAPE, dtype=bool), Config())
    residents.start(None)
    assert (residents.begin([Running("sql", 10, 10, new=True)]) == 0) == kept


def used(*experts: int) -> np.ndarray:
    table = np.zeros(SHAPE, dtype=np.float32)
    table[:, list(experts)] = 7
    return table


def test_after_a_change_forecasts_come_sooner_and_then_ever_more_rarely() -> None:
    rhythm = Rhythm(6, impatient=True)

    def prompts(count: int) -> list[int]:
        """Which of the next prompts find a forecast due."""
        found = []
        for number in range(1, count + 1):
            if rhythm.due:
                rhythm.forecast()
                found.append(number)
            rhythm.count(1)
        return found

    assert prompts(21) == [2, 4, 8, 14, 20]  # after 1, 2, 4, then 6 and 6
    rhythm.change()
    assert prompts(8) == [1, 3, 7]


def test_the_papers_period_is_not_cut_short() -> None:
    rhythm = Rhythm(3, impatient=False)
    rhythm.change()
    for _ in range(3):
        assert not rhythm.due
        rhythm.count(1)
    assert rhythm.due


def test_what_is_served_worse_than_promised_is_forecast_early() -> None:
    rig = Rig(Emoe(), period=40, impatient=True)
    for _ in range(60):
        rig.begin("sql+")
        rig.host.observe("sql", used(0, 1))  # as promised
    rig.forecast.now["sql"] = (2, 3)
    for _ in range(3):
        rig.begin("sql+")
    assert rig.cache.sets == [[0, 1]] * 2  # the period has not ended
    rig.host.observe("sql", used(2, 3))
    rig.begin("sql")
    assert rig.cache.sets == [[0, 1]] * 2  # no other prompt comes
    rig.begin("sql+")
    assert rig.cache.sets == [[2, 3]] * 2


def test_a_task_that_was_never_forecast_lets_forecasts_come_early() -> None:
    rig = Rig(Emoe(), period=40, impatient=True)
    for _ in range(60):
        rig.begin("sql+")
    rig.begin("json+")
    rig.forecast.now["json"] = (0, 1)
    rig.begin("json")
    assert rig.cache.sets == [[2, 3]] * 2
    rig.begin("json+")
    assert rig.cache.sets == [[0, 1]] * 2


def test_drift_is_what_was_promised_and_not_served() -> None:
    drift = Drift(decay=0.5, limit=0.2)
    resident = np.array([[True, True, False, False]] * 2)
    promised = np.array([[0.6, 0.2, 0.2, 0.0]] * 2)  # 0.8 of it there
    drift.observe(promised, np.array([[1, 1, 2, 0]] * 2), resident)  # 0.5: 0.3 missed, halved
    assert not drift.due
    drift.observe(promised, np.array([[1, 1, 2, 0]] * 2), resident)  # 0.225
    assert drift.due
    drift.observe(promised, np.array([[4, 0, 0, 0]] * 2), resident)  # better than promised
    assert not drift.due
    drift.observe(promised, np.array([[0, 0, 0, 1]] * 2), resident)
    assert drift.due
    drift.reset()
    assert not drift.due
