"""Requests that arrive by chance, served by the real scheduler on a simulated clock."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinue.engine.arrivals import (
    Arrival,
    Clock,
    Costs,
    Kind,
    Simulation,
    Summary,
    poisson,
    summary,
)
from retinue.engine.blocks import BlockPool
from retinue.engine.request import Request, State
from retinue.engine.scheduler import Limits, Scheduler
from retinue.errors import Overloaded
from retinue.policy.order.cohort import Cohort
from retinue.policy.order.estimate import PATIENCE_S, Estimate
from retinue.policy.order.named import order_named
from retinue.types import Deadline

KINDS = (
    Kind("sum", 300, 40, Deadline(2.0, 0.3)),
    Kind("classify", 100, 4, Deadline(1.0)),
    Kind("qa", 200, 20, Deadline(1.5, 0.3)),
    Kind("compare", 120, 6, Deadline(1.0, 0.3)),
    Kind("chat", 80, 100, Deadline(2.0, 0.2)),
)
CARELESS = tuple(replace(kind, deadline=None) for kind in KINDS)
COSTS = Costs(prefill=(0.01, 0.0005), decode=(0.02, 0.002))
CAPACITY = 4.2  # requests a second, of all kinds alike, eight at once
ALL = Cohort(layers=1, experts=1, top_k=1, slots=1)


class Served:
    """One order's simulation of `arrivals`, with who was admitted in which order, and when."""

    def __init__(
        self, name: str, arrivals: Sequence[Arrival], costs: Costs = COSTS, **limits: int
    ) -> None:
        clock = Clock()
        bounds = Limits(**({"context": 4096, "chunk": 512, "batch": 8, "queue": 10**6} | limits))
        order = order_named(name, Estimate())
        scheduler = Scheduler(BlockPool(1000), bounds, ALL, order, clock)
        self.admitted: list[tuple[float, Request]] = []
        self.passes: list[tuple[str, int]] = []
        plain_admit, plain_passed = scheduler.admit, scheduler.passed

        def admit() -> Request | None:
            if (request := plain_admit()) is not None:
                self.admitted.append((clock.now, request))
            return request

        def passed(phase: str, cost: object, read: int, begun_s: float) -> None:
            self.passes.append((phase, len(scheduler.running)))
            plain_passed(phase, cost, read, begun_s)  # type: ignore[arg-type]

        scheduler.admit, scheduler.passed = admit, passed  # type: ignore[method-assign,assignment]
        self.requests = Simulation(scheduler, clock, costs).run(arrivals)
        assert not scheduler.busy

    @property
    def summary(self) -> Summary:
        return summary(self.requests)


def test_arrivals_are_the_same_for_the_same_seed_and_as_many_as_asked() -> None:
    arrivals = poisson(KINDS, 5.0, 2000, seed=1)
    assert arrivals == poisson(KINDS, 5.0, 2000, seed=1) != poisson(KINDS, 5.0, 2000, seed=2)
    assert arrivals[-1].at == pytest.approx(400, rel=0.1)
    assert len(arrivals) == 2000
    for kind in KINDS:
        mine = [arrival for arrival in arrivals if arrival.kind is kind]
        assert len(mine) == pytest.approx(400, rel=0.2)
        mean = sum(arrival.prompt_tokens for arrival in mine) / len(mine)
        assert mean == pytest.approx(kind.prompt_tokens, rel=0.1)


def test_one_request_by_hand() -> None:
    """100 tokens of prompt in two passes, and two more tokens."""
    kind = Kind("a", 100, 3, Deadline(0.2, 0.03))
    (request,) = Served("fcfs", [Arrival(5.0, kind, 100, 3)], chunk=64).requests
    assert request.state is State.DONE
    assert request.first_token_s == pytest.approx(2 * 0.01 + 100 * 0.0005)
    assert request.longest_gap_s == pytest.approx(0.022)
    assert request.last_token_at == pytest.approx(5.0 + 0.07 + 2 * 0.022)
    assert request.in_time
    assert not replace_deadline(request, Deadline(0.069)).in_time
    assert not replace_deadline(request, Deadline(None, 0.021)).in_time
    assert replace_deadline(request, None).in_time


def replace_deadline(request: Request, deadline: Deadline | None) -> Request:
    request.deadline = deadline
    return request


def test_loading_the_experts_of_a_task_that_comes_takes_time() -> None:
    kinds = [Kind(name, 10, 1) for name in "aab"]
    arrivals = [Arrival(at, kind, 10, 1) for at, kind in enumerate(kinds)]
    costs = replace(COSTS, load=(0.1, 0.2), loads={"a": 1, "b": 2})
    first, second, third = Served("fcfs", arrivals, costs).requests
    assert first.first_token_s == pytest.approx(0.015 + 0.1 + 0.2)
    assert second.first_token_s == pytest.approx(0.015)
    assert third.first_token_s == pytest.approx(0.015 + 0.1 + 0.4)


def test_a_summary_by_hand() -> None:
    kind = Kind("a", 10, 2, Deadline(0.0155))
    arrivals = [Arrival(at, kind, 10, 2) for at in (1.0, 1.0, 2.0)]
    found = Served("fcfs", arrivals).summary
    # The first two share a pass, and are late.
    assert (found.requests, found.in_time, found.refused) == (3, 1, 0)
    assert found.seconds == pytest.approx(1 + 0.015 + 0.022)
    assert found.goodput == pytest.approx(1 / found.seconds)
    assert found.attainment == pytest.approx(1 / 3)
    assert found.first_token_p50_s == found.worst_wait_s == pytest.approx(0.02)
    assert found.latency_p50_s == pytest.approx(0.02 + 0.024)
    assert found.tasks["a"].attainment == found.attainment
    assert found.as_dict()["tasks"]["a"]["goodput"] == pytest.approx(found.goodput)


# --- what the orders are for


@pytest.mark.parametrize("load", [1.2, 1.5])
def test_past_saturation_deadlines_are_kept_by_emoe(load: float) -> None:
    arrivals = poisson(KINDS, load * CAPACITY, 600, seed=3)
    plain, ours = (Served(name, arrivals).summary for name in ("fcfs", "emoe"))
    assert ours.attainment > 1.5 * plain.attainment
    assert ours.goodput > 1.5 * plain.goodput
    assert ours.attainment > 0.8 / load
    assert ours.refused > 0
    for task in ours.tasks.values():
        assert task.attainment > 0.4 / load, "no task pays for the others alone"


def test_under_light_load_nobody_is_refused_or_late() -> None:
    found = Served("emoe", poisson(KINDS, 0.4 * CAPACITY, 400, seed=3)).summary
    assert found.refused == 0
    assert found.attainment > 0.98


def test_sharing_experts_saves_loading() -> None:
    """Two tasks in turn, each of which would drive out the other's experts."""
    kinds = [Kind(name, 50, 5, Deadline(20.0)) for name in "ab"]
    costs = replace(COSTS, load=(0.0, 0.05), loads={"a": 10, "b": 10})
    arrivals = [Arrival(0.2 * at, kinds[at % 2], 50, 5) for at in range(120)]
    seconds = []
    for shares in (False, True):
        served = WithReads(arrivals, costs, shares).requests
        seconds.append(summary(served).seconds)
    assert seconds[1] < 0.8 * seconds[0]


@pytest.mark.parametrize(("batch", "rate"), [(1, 1.3), (4, 3.0)])
def test_without_deadlines_too(batch: int, rate: float) -> None:
    """Five tasks past saturation: fewer experts a token, less waiting, and nobody for ever."""
    costs = replace(COSTS, load=(0.0, 0.01), loads={kind.task: 20 for kind in CARELESS})
    arrivals = poisson(CARELESS, rate, 400, seed=8)
    plain, shared = (WithReads(arrivals, costs, shares, batch) for shares in (False, True))
    assert shared.loaded < 0.6 * plain.loaded
    assert shared.summary.seconds < plain.summary.seconds
    assert shared.summary.latency_p50_s < plain.summary.latency_p50_s
    assert shared.summary.worst_wait_s < plain.summary.worst_wait_s + PATIENCE_S
    for place, request in enumerate(shared.admitted):
        assert all(request.arrived <= one.arrived + PATIENCE_S for one in shared.admitted[place:])


class WithReads:
    """The order emoe with reads that cost time; if it `shares`, it knows who lacks how many."""

    def __init__(
        self, arrivals: Sequence[Arrival], costs: Costs, shares: bool, batch: int = 1
    ) -> None:
        clock = Clock()
        estimate = Estimate(loads=(lambda task: simulation.lacking(task)) if shares else None)
        limits = Limits(context=4096, chunk=512, batch=batch)
        order = order_named("emoe", estimate)
        scheduler = Scheduler(BlockPool(1000), limits, ALL, order, clock)
        self.admitted: list[Request] = []
        admit = scheduler.admit

        def noted() -> Request | None:
            if (request := admit()) is not None:
                self.admitted.append(request)
            return request

        scheduler.admit = noted  # type: ignore[method-assign]
        simulation = Simulation(scheduler, clock, costs)
        self.requests = simulation.run(arrivals)
        self.loaded, self.summary = simulation.loaded, summary(self.requests)


# --- what holds for every order


def lists() -> st.SearchStrategy[list[Arrival]]:
    """Bursts of requests of all lengths, with and without deadlines that can be kept or not."""
    seconds = st.none() | st.sampled_from([0.01, 0.1, 1.0, 10.0, 100.0])
    deadlines = st.none() | st.builds(Deadline, seconds, seconds)
    kinds = st.builds(Kind, st.sampled_from("abc"), st.just(1), st.integers(1, 40), deadlines)
    gaps = st.sampled_from([0.0, 0.0, 0.01, 0.3])
    parts = st.tuples(gaps, kinds, st.integers(1, 900), st.integers(1, 60))

    def lay_out(given: list[tuple[float, Kind, int, int]]) -> list[Arrival]:
        now, found = 0.0, []
        for gap, *rest in given:
            now += gap
            found.append(Arrival(now, *rest))
        return found

    return st.lists(parts, min_size=1, max_size=60).map(lay_out)


@pytest.mark.parametrize("name", ["fcfs", "shortest", "emoe"])
@given(arrivals=lists(), batch=st.integers(1, 5), queue=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_every_request_ends(name: str, arrivals: list[Arrival], batch: int, queue: int) -> None:
    served = Served(name, arrivals, batch=batch, queue=queue)
    assert len(served.requests) == len(arrivals)
    for request, arrival in zip(served.requests, arrivals, strict=True):
        if request.state is State.DONE:
            assert request.answered == arrival.answer_tokens
        else:
            assert isinstance(request.error, Overloaded)
            assert request.error.retry_after_s > 0
            assert request.answered == 0
    admitted = [request for _, request in served.admitted]
    assert len(set(map(id, admitted))) == len(admitted)
    assert {r for r in served.requests if r.state is State.DONE} == set(admitted)


@given(arrivals=lists(), batch=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_without_deadlines_emoe_is_first_come_first_served(
    arrivals: list[Arrival], batch: int
) -> None:
    careless = [replace(each, kind=replace(each.kind, deadline=None)) for each in arrivals]
    plain, ours = (Served(name, careless, batch=batch) for name in ("fcfs", "emoe"))
    assert plain.passes == ours.passes
    times = [[request.last_token_at for request in served.requests] for served in (plain, ours)]
    assert times[0] == times[1]


@pytest.mark.parametrize("name", ["shortest", "emoe"])
@pytest.mark.parametrize("careless", [CARELESS[0], Kind("sum", 300, 40, Deadline(0.05))])
def test_nobody_is_overtaken_after_some_time(name: str, careless: Kind) -> None:
    """Some have no deadline, or one that they have missed, while others come for ever."""
    kinds = (careless, *KINDS[1:])
    served = Served(name, poisson(kinds, 2.0 * CAPACITY, 700, seed=5))
    waits = [at - request.arrived for at, request in served.admitted]
    assert max(waits) > PATIENCE_S, "some did have to wait"
    for place, (_, request) in enumerate(served.admitted):
        for _, overtaken in served.admitted[place + 1 :]:
            assert request.arrived <= overtaken.arrived + PATIENCE_S
    assert all(r.state is State.DONE or r.error for r in served.requests)
