"""What replays of a comparison go by: the tokens that ran, and times from elsewhere."""

import numpy as np

from retinue.compare.grid import Disk
from retinue.compare.ran import Ran, as_bench
from retinue.compare.replayed import fed
from retinue.engine.tasks import TaskIds
from retinue.sim.changed import Rows, choice_of
from retinue.sim.costs import Times, averaged
from test_compare import NATIVE, runs_of, some_grid


def test_the_replay_has_the_tokens_that_ran() -> None:
    """Of four tokens that follow, one comes with the prompt's pass and two or all are fed."""
    text = TaskIds("a", [1, 2, 3, 4, 5, 6], 4)
    assert fed(text, 2) == TaskIds("a", [1, 2, 3, 4], 2)
    assert fed(text, 9) == TaskIds("a", [1, 2, 3, 4, 5], 3)


def test_a_live_row_as_a_bench_of_one_prompt() -> None:
    row = runs_of("on-demand", 10, texts=4, prefill_dense_s=2.0, prefill_expert_s=6.0)[0]
    found = as_bench(row | {"prefill_tokens": 40, "prefill_overhead_s": 1.0})
    assert found["prompt_tokens"] == 10
    assert (found["prefill_dense_s"], found["prefill_expert_s"]) == (0.5, 1.5)
    assert found["prefill_overhead_s"] == 0.25
    assert found["hits"] == row["hits"]


def test_times_come_from_the_nearest_other_place() -> None:
    wanted = some_grid("on-demand", "auto", runs=1, experts=("12.5%", "25%", "50%"))
    live = []
    for experts, slots in (("12.5%", 5), ("25%", 10), ("50%", 20)):
        for limit in (None, "100MB"):
            place = {"experts": experts, "slots": slots, "read_limit": limit}
            live += [*runs_of("on-demand", 10, **place), *runs_of("auto", 8, **place)]
    known = Ran(live, wanted)
    assert len(known.places) == 6
    for place in known.places:
        others = known.elsewhere(place)
        assert {other.disk for other in others} == {place.disk}
        nearest = {5: [10], 10: [5, 20], 20: [10]}[known.slots(place)]
        assert [known.slots(other) for other in others] == nearest
    alone = Ran(live[:4], wanted)  # one budget: then another disk, and else the place itself
    assert [each.disk for each in alone.places] == [NATIVE, Disk("100MB")]
    assert alone.elsewhere(alone.places[0]) == [alone.places[1]]
    only = Ran(live[:2], wanted)
    assert only.elsewhere(only.places[0]) == [only.places[0]]


def test_a_slope_counts_as_far_as_its_passes_varied() -> None:
    wanted = some_grid("on-demand", runs=2, experts=("12.5%", "25%", "50%"))
    live = []
    for experts, slots, late, varied in (
        ("12.5%", 5, 9.0, 1.0),
        ("25%", 10, 1.0, 4.0),
        ("50%", 20, 2.0, 12.0),
    ):
        each = {"experts": experts, "slots": slots, "late_s": late, "late_spread": varied}
        live += runs_of("on-demand", 10, 11, **each)
    known = Ran(live, wanted)
    slopes = [known.slopes(place) for place in known.places]
    assert [found["late_s"] for found in slopes] == [28 / 16, 33 / 13, 13 / 5]
    assert slopes[0]["start_s"] is None, "the runs do not say it"


def test_the_mean_of_times() -> None:
    found = averaged([Times(1.0, 2.0, start_s=3.0), Times(2.0, 4.0, elsewhere_s=1.0)])
    assert found == Times(1.5, 3.0, start_s=1.5)


def test_a_replayed_routing_sees_the_inputs_that_it_asks_for() -> None:
    """Such as `pre-gated`, whose gates read the layer's input."""
    rows = Rows(np.array([[0, 1]]), np.array([[0.6, 0.4]], np.float32))
    scores, hidden = np.array([[0.6, 0.4, 0.0]], np.float32), np.ones((1, 5), np.float32)
    assert choice_of(1, rows, scores, "decode", hidden).hidden is hidden
    assert choice_of(1, rows, scores, "decode").hidden is None
