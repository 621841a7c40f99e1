"""The soak: its verdicts, and its clients against a server around the counting network."""

import asyncio
import time
from collections import Counter
from typing import Any

import pytest
from benchmarks import soak, soak_child

from serving import NAME, FakeServed, ready

BEFORE = {"threads": 9, "files": 5, "resident_bytes": 100, "peak_bytes": 100, "processor_s": 1}
DURING = BEFORE | {"threads": 10, "files": 69, "resident_bytes": 200, "peak_bytes": 210}
TASK = {"task": "code", "answered": 90, "failed": 0}
GOOD: dict[str, Any] = {
    "outcomes": {"whole: 200": 90, "look: 404": 1, "stream: 429 queue_full": 5, "leave: left": 7},
    "weights": [BEFORE, DURING, DURING, DURING, DURING | {"files": 5}],
    "tasks": [TASK],
    "idle_after_s": 0.1,
    "running": 0,
    "waiting": 0,
    "kv_used": 0.0,
    "health": 200,
    "exit_code": 0,
    "budget_bytes": 250,
    "log": ["stopped"],
}


def test_a_good_run_keeps_every_promise() -> None:
    verdicts = soak.judged(GOOD)
    assert all(verdicts.values())
    assert [row.ok for row in soak.rows(GOOD, verdicts)] == [True, True]
    assert not any("NOT SO" in line for line in soak.notes(GOOD, verdicts))


@pytest.mark.parametrize(
    "change",
    [
        {"outcomes": {"whole: LOST Lost: closed": 1}},
        {"outcomes": {"whole: 500 internal_error": 1}},
        {"outcomes": {"stream: 200, an error at its end": 1}},
        {"tasks": []},
        {"tasks": [TASK, TASK | {"task": "unheard-1"}]},
        {"tasks": [TASK | {"failed": 1}]},
        {"idle_after_s": 9.0},
        {"kv_used": 0.1},
        {"weights": [BEFORE, DURING, DURING, DURING, DURING]},
        {"weights": [*[BEFORE] * 4, BEFORE | {"threads": 11}]},
        {"weights": [BEFORE, BEFORE, BEFORE, DURING | {"files": 5}, BEFORE]},
        {"health": 503},
        {"exit_code": 1},
    ],
)
def test_each_fault_breaks_one(change: dict[str, Any]) -> None:
    found = GOOD | change
    verdicts = soak.judged(found)
    assert list(verdicts.values()).count(False) == 1
    assert [row.ok for row in soak.rows(found, verdicts)] == [True, False]
    assert any("NOT SO" in line for line in soak.notes(found, verdicts))


def test_clients_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind three times, all at once, and then by chance: nothing stays behind."""
    monkeypatch.setattr(soak_child, "MODEL", NAME)
    seen: Counter[str] = Counter()
    with ready(FakeServed(context=640), queue=60, max_body=soak_child.MOST_BODY) as it:
        port = int(it.url.rpartition(":")[2])

        async def crowd() -> None:
            kinds = 3 * list(soak_child.KINDS)
            clients = [soak_child.Client(port, seed, seen) for seed in range(len(kinds))]
            pairs = zip(clients, kinds, strict=True)
            await asyncio.gather(*(client.once(kind) for client, kind in pairs))
            until = time.monotonic() + 0.1
            await asyncio.gather(*(client.run(until) for client in clients))

        asyncio.run(crowd())
        it.idle()
        it.until(lambda: not it.server.bridge.held)
    assert not [outcome for outcome in seen if soak.BROKEN.search(outcome)]
    assert {outcome.partition(":")[0] for outcome in seen} == {
        kind.__name__.strip("_") for kind in soak_child.KINDS
    }
    assert {"whole: 200", "stream: 200", "oversized: 413", "malformed: 400"} <= set(seen)
