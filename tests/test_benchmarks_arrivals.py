"""The benchmark of arrivals: its rows, and one small run on the sample."""

from typing import Any

import pytest
from benchmarks import arrivals, arrivals_child

from models import open_llm
from retinue.config import ORDERS


def document(ours: float, other: float) -> dict[str, Any]:
    """What a round says, with these shares of requests in time at each load."""
    shares = {"emoe": ours, "fcfs": other, "shortest": 0.5}
    summary = {"goodput": 2.0, "refused": 1, "worst_wait_s": 3.0, "tasks": {}}
    summary |= dict.fromkeys(("first_token_p50_s", "first_token_p99_s"), 0.1)
    summary |= dict.fromkeys(("latency_p50_s", "latency_p99_s"), 0.2)
    runs = [
        {"load": load, "order": order}
        | dict.fromkeys(("live", "simulated"), summary | {"attainment": share})
        for load in (0.8, 1.5)
        for order, share in shares.items()
    ]
    known = {"requests": 9, "requests_per_s": 2.0, "first_token_s": 1.0, "between_tokens_s": 0.1}
    return known | {"runs": runs}


@pytest.mark.parametrize(("ours", "ok"), [(0.8, True), (0.5, False)])
def test_the_promise_is_for_what_is_past_saturation(ours: float, ok: bool) -> None:
    rounds = [document(ours, 0.4), document(ours, 0.5), document(ours, 0.3)]
    calm, rush = (arrivals.row(rounds, load, "live", "attainment", "share") for load in (0.8, 1.5))
    assert (calm.ok, rush.ok) == (None, ok)
    assert (rush.ours, rush.other, rush.ratio) == (ours, 0.4, pytest.approx(ours / 0.4))
    assert "load 1.5, emoe     in time" in arrivals.note(rounds[0], 1)


def test_a_small_run() -> None:
    """What it says depends on the machine; that everything is served and counted does not."""
    settings = {"context": arrivals_child.CONTEXT, "kv_tokens": 8 * arrivals_child.CONTEXT}
    with open_llm("sample", batch=arrivals_child.BATCH, **settings) as llm:
        found = arrivals_child.measure(llm, 10, [1.5], seed=1)
    assert [run["order"] for run in found["runs"]] == list(ORDERS)
    assert found["costs"]["decode"] > (0.0, 0.0)
    for run in found["runs"]:
        for summary in (run["live"], run["simulated"]):
            assert summary["requests"] == 10
            assert summary["in_time"] + summary["refused"] <= 10
            assert summary["seconds"] > 0
        if run["order"] != "emoe":
            assert run["live"]["refused"] == 0
