"""Replays without a model: demands, passes, times by hand, the oracle, and the rows."""

import sys
from collections import deque
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from recordings import (
    HEAD,
    LAYERS,
    READ_BYTES,
    TOP_K,
    chance,
    replay,
    replayed,
    setting,
    trace_of,
)
from retinue.errors import UsageError
from retinue.memory import payback
from retinue.policy.base import View
from retinue.policy.evict.belady import future_of
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import Policies
from retinue.sim.costs import Times
from retinue.sim.passes import Load, Passes
from retinue.sim.recorded import Part, Recording
from retinue.sim.rows import beside, row_of
from retinue.trace import routed_of
from retinue.types import Demand, Want


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    requests = [chance(seed, 40 + seed, prompt=5) for seed in range(4)]
    trace = trace_of(tmp_path / "a.trace", requests, ("scores", "next_scores"))
    return Recording(trace, ["scores", "next_scores"])


def test_demands_of_one_token_and_of_many_are_the_same(recording: Recording) -> None:
    for part in (Part(0, 7, 8), Part(2, 0, 1)):
        alone = recording.demands([part])
        many = recording._of_many(*recording.rows([part], slice(None)))
        for one, other in zip(alone, many, strict=True):
            assert one.layer == other.layer
            assert one.experts.tolist() == other.experts.tolist()
            assert one.tokens.tolist() == other.tokens.tolist()
            assert np.allclose(one.weight, other.weight)


def test_demands_by_hand(tmp_path: Path) -> None:
    experts = np.array([[[3, 1]] * 3, [[1, 8]] * 3])  # 8 is none
    weights = np.array([[[0.75, 0.25]] * 3, [[0.5, 0.5]] * 3], np.float32)
    trace = trace_of(tmp_path / "a.trace", [routed_of(HEAD, None, 1, experts, weights)])
    recording = Recording(trace)
    assert not recording.requests[0].plain
    (both, *_) = recording.demands([Part(0, 0, 2)])
    assert (both.experts.tolist(), both.tokens.tolist()) == ([1, 3], [2, 1])
    assert np.allclose(both.weight, [0.75, 0.75])
    (second, *_) = recording.demands([Part(0, 1, 2)])
    assert (second.experts.tolist(), second.tokens.tolist()) == ([1], [1])
    assert recording.pairs == 6


class Seer:
    """Notes what coming layers' routers say, by the layer that runs."""

    needs, depth, speculative = frozenset({"next_scores"}), 2, False

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, list[float] | None]]] = {}

    def observe(self, demand: Demand, view: View) -> None:
        pass

    def forecast(self, view: View) -> list[Want]:
        said = [(a.layer, None if a.scores is None else a.scores[0].tolist()) for a in view.ahead]
        self.seen[view.layer] = said
        return []


@pytest.mark.parametrize("further", [True, False])
def test_looks_see_as_far_as_the_trace(further: bool, tmp_path: Path) -> None:
    request = chance(3, 2, prompt=1)
    second = request.signals["scores"][:, 2:] / 2
    signals = {**request.signals, "second_scores": second}
    names = ("scores", "next_scores", "second_scores")[: 2 + further]
    trace = trace_of(tmp_path / "a.trace", [replace(request, signals=signals)], names)
    seer = Seer()
    replay(Recording(trace, names), Policies(Recency(), seer, FetchAll()), setting(slots=4))
    (read,) = trace.requests(names)
    near = read.signals["next_scores"][1]
    far = read.signals["second_scores"][1, 0].tolist() if further else None
    assert seer.seen == {
        0: [(1, near[0].tolist()), (2, far)],
        1: [(2, near[1].tolist())],
    }


def test_equal_weights_go_by_the_order_of_the_router(tmp_path: Path) -> None:
    experts, weights = np.array([[[5, 2]] * 3]), np.full((1, 3, 2), 0.5, np.float32)
    trace = trace_of(tmp_path / "a.trace", [routed_of(HEAD, None, 0, experts, weights)])
    (demand, *_) = Recording(trace).demands([Part(0, 0, 1)])
    assert demand.experts[np.argmax(demand.weight)] == 5


def test_sums_alone_cannot_be_replayed(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "a.trace", [chance(0, 5)], detail="histogram")
    with pytest.raises(UsageError, match="no tokens, only sums"):
        Recording(trace)


def passes_of(recording: Recording, load: Load) -> list[tuple[str, list[tuple[int, int, int]]]]:
    passes, found = Passes(recording.requests, load, None), []
    slept: list[float] = []
    while (now := passes.next(slept[-1] if slept else 0.0, slept.append)) is not None:
        found.append((now.phase, [(part.request, part.start, part.stop) for part in now.parts]))
        passes.ran(now)
    return found


def test_one_after_the_other(recording: Recording) -> None:
    found = passes_of(recording, Load())
    assert found[:2] == [("prefill", [(0, 0, 5)]), ("decode", [(0, 5, 6)])]
    assert len(found) == sum(1 + request.answer_tokens for request in recording.requests)


def test_together_and_in_chunks(recording: Recording) -> None:
    found = passes_of(recording, Load(batch=3, chunk=7))
    assert found[0] == ("prefill", [(0, 0, 5), (1, 0, 2)])
    assert found[1] == ("prefill", [(1, 2, 5), (2, 0, 4)])
    assert found[2] == ("prefill", [(2, 4, 5)])
    assert found[3] == ("decode", [(0, 5, 6), (1, 5, 6), (2, 5, 6)])
    tokens = [part for _, parts in found for part in parts]
    assert sum(stop - start for _, start, stop in tokens) == 40 + 41 + 42 + 43
    phases = [phase for phase, _ in found]
    late = phases.index("prefill", 4)
    assert found[late][1] == [(3, 0, 5)], "who waited starts when another has ended"


def test_nobody_starts_before_it_came(recording: Recording) -> None:
    place = setting(16, load=Load(batch=4, arrivals=(0.0, 0.02, 100.0, 200.0)))
    outcome = replayed(recording, "on-demand", place)
    assert outcome.seconds > 200
    assert max(outcome.first_token_s) < 1, "counted from each one's arrival"
    assert outcome.decode.passes < sum(each.answer_tokens for each in recording.requests)


def test_times_by_hand(tmp_path: Path) -> None:
    """Everything cold, then everything there: two reads side by side, then both are computed."""
    experts, weights = np.array([[[0, 1]] * 3] * 2), np.full((2, 3, 2), 0.5, np.float32)
    trace = trace_of(tmp_path / "a.trace", [routed_of(HEAD, None, 0, experts, weights)])
    times = Times(expert_s=1e-4, layer_s=2e-4, pass_s=5e-4)
    outcome = replayed(Recording(trace), "on-demand", setting(8, times=times))
    decode, read_s = outcome.decode, READ_BYTES / 1e6
    assert (decode.hits, decode.pending, decode.misses) == (LAYERS * 2, 0, LAYERS * 2)
    assert decode.bytes_read == LAYERS * 2 * READ_BYTES
    cold = LAYERS * (2e-4 + 2 * read_s + 2 * 1e-4)
    warm = LAYERS * (2e-4 + 2 * 1e-4)
    assert decode.seconds == pytest.approx(2 * 5e-4 + cold + warm)
    assert decode.stall_s == pytest.approx(LAYERS * 2 * read_s)
    assert decode.expert_s == pytest.approx(LAYERS * 4 * 1e-4)
    assert decode.seconds == pytest.approx(decode.stall_s + decode.expert_s + decode.dense_s)


def test_what_is_counted_costs_by_hand(tmp_path: Path) -> None:
    """Reads that are started one by one, and a layer that lacks an expert."""
    experts, weights = np.array([[[0, 1]] * 3] * 2), np.full((2, 3, 2), 0.5, np.float32)
    trace = trace_of(tmp_path / "a.trace", [routed_of(HEAD, None, 0, experts, weights)])
    times = Times(expert_s=1e-4, layer_s=2e-4, late_s=3e-4, start_s=5e-4, ahead_s=7e-5)
    outcome = replayed(Recording(trace), "on-demand", setting(8, times=times))
    decode, read_s = outcome.decode, READ_BYTES / 1e6
    assert (decode.lacking, decode.looks) == (LAYERS, 0)
    # Both reads are started first, come side by side, and are computed together.
    cold = LAYERS * (2e-4 + 2 * 5e-4 + 2 * read_s + 3e-4 + 2 * 1e-4)
    warm = LAYERS * (2e-4 + 2 * 1e-4)
    assert decode.seconds == pytest.approx(cold + warm)
    assert decode.expert_s == pytest.approx(LAYERS * (3e-4 + 4 * 1e-4))


def test_looking_ahead_takes_its_time(recording: Recording) -> None:
    slow = replace(setting().times, ahead_s=1e-3)
    plain = replayed(recording, "layer-stream", setting(16, disk=1e9))
    found = replayed(recording, "layer-stream", setting(16, disk=1e9, times=slow))
    assert found.decode.looks == plain.decode.looks > 0
    more_s = found.decode.seconds - plain.decode.seconds
    assert more_s == pytest.approx(1e-3 * found.decode.looks, rel=0.01)


@pytest.mark.parametrize(("disk", "looks"), [(1e5, True), (1e8, False)])
def test_prompts_look_ahead_where_they_wait(recording: Recording, disk: float, looks: bool) -> None:
    times = Times(1e-4, 2e-4, 1e-5, 1e-5, ahead_s=1e-3)
    prompts = replayed(recording, "mixtral-offloading", setting(20, disk=disk, times=times)).prefill
    assert prompts.lacking > prompts.passes
    assert prompts.looks > prompts.passes if looks else prompts.looks == 1, "the first one tells"


def least_recent(recording: Recording, slots: int) -> int:
    """Misses of plain LRU over (layer, expert), as the cache's recency has it: by pass."""
    used: dict[tuple[int, int], int] = {}
    misses = step = 0
    for number, request in enumerate(recording.requests):
        for token in range(request.tokens):
            step += 1
            for demand in recording.demands([Part(number, token, token + 1)]):
                need = [(demand.layer, expert) for expert in demand.experts.tolist()]
                lacking = [key for key in need if key not in used]
                misses += len(lacking)
                away = {key: (key[0] - demand.layer - 1) % LAYERS for key in used}
                leaving = sorted(
                    (key for key in used if key not in need),
                    key=lambda key: (used[key] - away[key] / LAYERS, key),
                )
                for key in leaving[: max(0, len(used) + len(lacking) - slots)]:
                    del used[key]
                used |= dict.fromkeys(need, step)
    return misses


@pytest.mark.parametrize("slots", [4, 7, 11, 23])
def test_recency_misses_what_plain_lru_misses(tmp_path: Path, slots: int) -> None:
    requests = [chance(seed, 60, prompt=0) for seed in range(3)]
    recording = Recording(trace_of(tmp_path / "a.trace", requests))
    assert replayed(recording, "on-demand", setting(slots)).decode.misses == least_recent(
        recording, slots
    )


def fewest(needs: list[frozenset[int]], slots: int) -> int:
    """The fewest misses that any choice of who leaves gives, by trying all states."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for need in needs:
        after: dict[frozenset[int], int] = {}
        for state, cost in states.items():
            lacking = need - state
            spare = sorted(state - need)
            room = slots - len(need)
            for kept in product((True, False), repeat=len(spare)):
                stay = [key for key, keep in zip(spare, kept, strict=True) if keep]
                if len(stay) <= room:
                    held = frozenset(stay) | need
                    after[held] = min(after.get(held, 1 << 30), cost + len(lacking))
        states = after
    return min(states.values())


@pytest.mark.parametrize("seed", range(4))
def test_nobody_misses_less_than_the_oracle(tmp_path: Path, seed: int) -> None:
    head = {"layers": 1, "routed": (0,), "facts": None}
    request = chance(seed, 14, prompt=0)
    assert request.experts is not None
    assert request.weights is not None
    small = routed_of(HEAD, None, 0, request.experts[:, :1], request.weights[:, :1])
    trace = trace_of(tmp_path / "a.trace", [small], **head)
    needs = [frozenset(row.tolist()) for row in request.experts[:, 0]]
    for slots in (3, 4):
        outcome = replayed(Recording(trace), "belady", setting(slots))
        assert outcome.decode.misses == fewest(needs, slots)


@pytest.mark.parametrize("slots", [6, 9, 16])
def test_the_oracle_is_never_behind(
    recording: Recording, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payback, "FIRST", sys.maxsize)  # no passes that try without look-ahead
    best = replayed(recording, "belady", setting(slots)).decode
    plain = replayed(recording, "on-demand", setting(slots)).decode
    ahead = replayed(recording, "auto", setting(slots)).decode
    assert best.misses < plain.misses
    assert best.bytes_read <= min(plain.bytes_read, ahead.bytes_read)
    assert ahead.hits + ahead.pending > plain.hits


@pytest.mark.parametrize("batch", [2, 4])
def test_the_oracle_knows_who_decodes_together(tmp_path: Path, batch: int) -> None:
    """Ten slots hold what one token needs, but not two; what repeats then decides."""
    requests = [chance(seed, 80 + 3 * seed, prompt=5) for seed in range(12)]
    recording = Recording(trace_of(tmp_path / "a.trace", requests))
    place = setting(10, load=Load(batch))
    best, plain = (replayed(recording, name, place) for name in ("belady", "on-demand"))
    assert best.decode.passes == plain.decode.passes
    assert best.decode.misses < plain.decode.misses


def test_the_future_by_hand() -> None:
    def demand(layer: int, *experts: int) -> Demand:
        ids = np.array(experts)
        return Demand(layer, ids, np.ones_like(ids), np.ones(len(ids), np.float32))

    future = future_of([demand(0, 1, 2), demand(1, 0), demand(0, 2, 3), demand(1, 0)], 2, 4)
    assert future.first.tolist() == [[4, 0, 0, 2], [1, 4, 4, 4]]
    uses = deque(future.after.tolist())
    assert list(uses) == [4, 2, 3, 4, 4, 4]
    assert future.starts.tolist() == [0, 2, 3, 5, 6]
    assert future_of([], 2, 4).first.tolist() == [[0] * 4] * 2


def test_a_faster_disk_and_more_room_never_hurt(recording: Recording) -> None:
    for name in ("on-demand", "auto"):
        seconds = [
            replayed(recording, name, setting(8, disk=disk)).seconds for disk in (5e5, 2e6, 1e8)
        ]
        assert seconds == sorted(seconds, reverse=True)
    hits = [replayed(recording, "on-demand", setting(slots)).decode.hits for slots in (6, 12, 24)]
    assert hits == sorted(hits)


def test_everything_in_memory_reads_everything_once(recording: Recording) -> None:
    outcome = replayed(recording, "on-demand", setting(LAYERS * 8))
    used = {
        (layer, expert)
        for request in recording.requests
        for layer in range(LAYERS)
        for expert in request.experts[:, layer].ravel().tolist()
    }
    whole = outcome.prefill.bytes_read + outcome.decode.bytes_read
    assert whole == len(used) * READ_BYTES
    assert outcome.decode.hit_rate > 0.9


def test_rows_and_the_distance_to_the_oracle(recording: Recording) -> None:
    place = setting(8)
    rows = {name: row_of(replayed(recording, name, place)) for name in ("on-demand", "belady")}
    oracle, plain = rows["belady"], rows["on-demand"]
    beside(rows, oracle)
    assert (oracle["hit_rate_below_belady"], oracle["reads_over_belady"]) == (0.0, 1.0)
    assert plain["hit_rate_below_belady"] == oracle["hit_rate"] - plain["hit_rate"] > 0
    assert plain["reads_over_belady"] > 1
    shares = [plain[name] for name in ("hit_rate", "pending_rate", "miss_rate")]
    assert sum(shares) == pytest.approx(1)
    tokens = sum(request.answer_tokens for request in recording.requests)
    assert plain["decode_tokens"] == tokens
    assert plain["hits"] + plain["misses"] == tokens * LAYERS * TOP_K
    assert plain["decode_tokens_per_s"] == pytest.approx(tokens / plain["decode_s"])


def test_others_serve_and_that_shows(recording: Recording) -> None:
    outcome = replayed(recording, "random", setting(12))
    decode = outcome.decode
    assert 0.1 < decode.degraded_share < 0.9
    assert decode.bytes_read == 0
    assert outcome.prefill.bytes_read == 12 * READ_BYTES, "the set is read once"
    assert decode.misses > 0
    assert replayed(recording, "random", setting(24)).decode.degraded_share == 0
