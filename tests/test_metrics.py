"""Counters that add up: of passes, requests and the process."""

import pytest

from retinue.metrics import Costs, Line, Metrics, PhaseCounters


def counted(**fields: int) -> PhaseCounters:
    return PhaseCounters(steps_s=[0.5], seconds=0.5, **fields)


def test_counters_add_up_by_field() -> None:
    total = counted(tokens=3, hits=2, misses=1)
    total.add(counted(tokens=4, hits=5, pending=2))
    assert (total.tokens, total.hits, total.pending, total.misses) == (7, 7, 2, 1)
    assert (total.seconds, total.steps_s) == (1.0, [0.5, 0.5])
    assert total.hit_rate == 0.7


def test_a_request_counts_its_own_tokens_of_a_pass() -> None:
    costs, shared = Costs(), counted(tokens=8, hits=16)
    costs.of("decode").add(shared, tokens=1)
    costs.of("decode").add(shared, tokens=1)
    assert (costs.decode.tokens, costs.decode.hits, costs.prefill.tokens) == (2, 32, 0)
    assert (shared.tokens, shared.steps_s) == (8, [0.5]), "what is added stays as it is"


def test_only_passes_that_succeed_count_for_the_process() -> None:
    metrics = Metrics()
    metrics.begin("prefill").tokens = 5
    metrics.finish()
    metrics.begin("decode").tokens = 7
    metrics.begin("decode").tokens = 2
    metrics.finish()
    assert (metrics.total.prefill.tokens, metrics.total.decode.tokens) == (5, 2)


def test_the_parts_of_a_phase_add_up_to_it() -> None:
    counters = PhaseCounters(seconds=10.0, stall_s=1.0, expert_s=2.0, dense_s=3.0)
    assert counters.overhead_s == 4.0
    counters.add(PhaseCounters(seconds=5.0, stall_s=0.5, expert_s=0.25, dense_s=0.25))
    assert (counters.stall_s, counters.expert_s, counters.dense_s) == (1.5, 2.25, 3.25)
    assert counters.overhead_s == 8.0


def test_nothing_looked_up_is_no_miss() -> None:
    assert PhaseCounters().hit_rate == 1.0
    assert PhaseCounters().degraded_share == 0.0
    assert PhaseCounters(degraded_weight=1.0, routed_weight=4.0).degraded_share == 0.25


def test_a_line_through_points() -> None:
    first, second = Line(), Line()
    for x in range(4):
        (first if x % 2 else second).point(x, 3 + 2 * x)
    assert first.slope == 2
    first += second
    assert first.slope == pytest.approx(2)
    assert first.weight == 4
    assert first.spread == pytest.approx(5.0), "1.5, 0.5, 0.5 and 1.5 from the mean, squared"
    assert Line().spread == 0
    assert Line().slope is None
    same = Line()
    for y in (1, 2, 3):
        same.point(5, y)
    assert same.slope is None
    falling = Line()
    for x in range(3):
        falling.point(x, 9 - x)
    assert falling.slope == 0, "more work never takes less time"


def test_what_one_more_costs_is_learnt_from_passes() -> None:
    metrics = Metrics()
    for reads, lacking in ((0, 1), (3, 2), (1, 5)):
        now = metrics.begin("decode")
        now.reads = reads
        for layer in range(6):
            metrics.count(layer, 1, misses=layer < lacking)
        now.expert_s = 0.1 + 0.01 * lacking
        now.seconds = now.expert_s + 0.2 + 0.05 * reads
        metrics.finish()
    total = metrics.total.decode
    assert total.counts == {"reads": 4, "lacking": 8, "looks": 0}
    assert total.starting.slope == pytest.approx(0.05)
    assert total.computing.slope == pytest.approx(0.01)
