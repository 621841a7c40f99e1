"""Which requests run, and what the next pass is for; sequences that are kept whole."""

import pytest

from fakes import BATCH, CHUNK, ask, finish, make
from retinue.engine.engine import Engine
from retinue.engine.request import Request, State
from retinue.errors import Overloaded, ReadError, UsageError
from retinue.policy.base import Running
from retinue.policy.order.cohort import Cohort
from retinue.policy.order.emoe import Emoe
from retinue.policy.order.estimate import Estimate
from retinue.types import BLOCK_TOKENS, Deadline


def queue(engine: Engine, *requests: Request) -> None:
    for request in requests:
        engine.add(request)


def states(*requests: Request) -> list[str]:
    return [request.state.value for request in requests]


# --- admission


def test_no_more_than_the_batch_run_at_once() -> None:
    engine, _ = make()
    requests = [ask([at], 3) for at in range(BATCH + 2)]
    queue(engine, *requests)
    engine.step()
    assert states(*requests) == ["decode"] * BATCH + ["waiting"] * 2
    engine.cancel(requests[1])
    engine.step()
    assert states(*requests[:BATCH]) == ["decode", "cancelled", "decode"]
    assert requests[BATCH].state is not State.WAITING
    assert requests[BATCH + 1].state is State.WAITING


def test_room_is_kept_for_the_longest_answer() -> None:
    """So a request that was admitted is never put back."""
    engine, _ = make(blocks=5, context=64)
    first, second = ask([1] * 20, 30), ask([1], BLOCK_TOKENS + 8)
    queue(engine, first, second)
    engine.step()
    assert len(first.table.blocks if first.table else []) == 4
    assert states(first, second) == ["prefill", "waiting"]
    finish(engine)
    assert states(first, second) == ["done", "done"]
    assert len(second.token_ids) == BLOCK_TOKENS + 8


def test_no_more_room_than_the_context_is_kept() -> None:
    engine, _ = make(blocks=2, context=32)
    request = ask([1], 10**6)
    queue(engine, request)
    engine.step()
    assert len(request.table.blocks if request.table else []) == 2
    finish(engine)
    assert (len(request.tokens), request.finish_reason) == (32, "length")


def test_nobody_overtakes_the_first_who_waits() -> None:
    """A small request that would fit waits behind a large one that does not, for its turn."""
    engine, _ = make(blocks=4, context=64)
    running, large, small = ask([1], 20), ask([1], 60), ask([1], 2)
    queue(engine, running, large, small)
    order: list[Request] = []
    while engine.busy:
        engine.step()
        order += [r for r in (running, large, small) if r.state is not State.WAITING]
        assert (small.state is State.WAITING) or large.state is not State.WAITING
    assert list(dict.fromkeys(order)) == [running, large, small]


# --- what a pass is for


def test_phases_take_turns_while_both_have_work() -> None:
    engine, runner = make(blocks=80, context=100)
    queue(engine, ask([1], 30, ignore_eos=True), ask([7] * (CHUNK * 4), 9))
    finish(engine)
    phases = [phase for phase, _ in runner.runs]
    assert phases[:9] == ["prefill", *["decode", "prefill"] * 4]
    assert set(phases[9:]) == {"decode"}


def test_a_chunk_is_filled_from_several_prompts_in_order() -> None:
    engine, runner = make()
    finish(engine, ask([1, 2, 3], 1), ask([11, 12, 13], 1), ask([21, 22], 1))
    assert [parts for _, parts in runner.runs] == [
        [([1, 2, 3], 0), ([11], 0)],
        [([12, 13], 1), ([21, 22], 0)],
    ]


def test_prompts_that_cannot_be_cut_wait_for_a_pass_of_their_own() -> None:
    engine, runner = make(whole_prompts=True, apart=True, sharing=False)
    finish(engine, ask([1, 2, 3], 1), ask([11, 12], 1), ask([21, 22], 1))
    assert [tokens for _, tokens, _ in runner.ran] == [[1, 2, 3], [11, 12], [21, 22]]
    with pytest.raises(UsageError, match="in one piece, and a piece has 4") as caught:
        engine.add(ask([1] * (CHUNK + 1)))
    assert caught.value.hint
    finish(engine, ask([1] * CHUNK, 1))


def test_few_decode_at_a_time_where_few_find_room_for_their_experts() -> None:
    """Those that arrived first; the others' turn comes when these end."""
    cohort = Cohort(layers=1, experts=8, top_k=4, slots=6)
    assert cohort.fitting == 2
    engine, runner = make(cohort=cohort)
    requests = [ask([at], 4) for at in (1, 11, 21)]
    finish(engine, *requests)
    decoded = [[tokens[0] // 10 for tokens, _ in parts] for phase, parts in runner.runs[1:]]
    assert decoded == [[0, 1]] * 3 + [[2]] * 3
    assert [request.token_ids for request in requests] == [
        [2, 3, 4, 5],
        [12, 13, 14, 15],
        [22, 23, 24, 25],
    ]


def test_the_network_hears_of_the_work_before_each_pass() -> None:
    engine, runner = make(batch=2)
    requests = [ask([1], 2), ask([11], 3), ask([21], 1)]
    for request, task in zip(requests, ("math", None, "code"), strict=True):
        request.task = task
    finish(engine, *requests)
    first = [Running("math", 1, 2, new=True), Running(None, 1, 3, new=True)]
    later = [Running("math", 1, 2), Running(None, 1, 3)]
    third = [Running(None, 1, 3), Running("code", 1, 1, new=True)]
    assert runner.host.running[:3] == [first, later, third]


# --- sequences that are kept whole


def whole() -> dict[str, bool]:
    return {"apart": True, "sharing": False}


def test_a_conversation_goes_on_in_its_sequence() -> None:
    engine, runner = make(**whole())
    finish(engine, ask([1, 2, 3], 4, reuse=True))
    runner.runs.clear()
    finish(engine, after := ask([1, 2, 3, 4, 5, 6, 9], 2, reuse=True))
    assert after.reused == 6  # the last new token was never run
    assert runner.ran[0] == ("prefill", [9], 6)
    assert after.token_ids == [10, 11]


@pytest.mark.parametrize(
    "prompt", [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9, 9], [1, 2], [5, 5, 5, 5, 5, 5, 5, 5]]
)
def test_a_state_serves_only_what_goes_on_from_it(prompt: list[int]) -> None:
    """A running state cannot be cut back, so an equal or an edited history is computed anew."""
    engine, runner = make(**whole())
    finish(engine, ask([1, 2, 3], 4, reuse=True))
    runner.runs.clear()
    finish(engine, after := ask(prompt, 1, reuse=True))
    assert after.reused == 0
    assert [token for _, tokens, _ in runner.ran for token in tokens] == prompt
    assert after.token_ids == [prompt[-1] + 1]


def test_a_sequence_serves_one_conversation_at_a_time() -> None:
    engine, _ = make(**whole())
    finish(engine, ask([1, 2, 3], 4, reuse=True))
    pair = [ask([1, 2, 3, 4, 5, 6, token], 2, reuse=True) for token in (20, 30)]
    finish(engine, *pair)
    assert [request.reused for request in pair] == [6, 0]
    assert [request.token_ids for request in pair] == [[21, 22], [31, 32]]


def test_sequences_are_kept_only_for_those_who_may_reuse_them() -> None:
    engine, _ = make(**whole())
    finish(engine, ask([1, 2, 3], 4))
    assert engine.scheduler.parked == []
    finish(engine, after := ask([1, 2, 3, 4, 5, 6, 9], 2, reuse=True))
    assert after.reused == 0
    finish(engine, again := ask([1, 2, 3, 4, 5, 6, 9, 10, 11, 12], 2))
    assert again.reused == 0


def test_kept_sequences_make_room_for_running_ones() -> None:
    """By number, and by blocks; the least recently used leaves first."""
    engine, _ = make(**whole())
    for at in range(BATCH):
        finish(engine, ask([10 * at, 5, 5], 2, reuse=True))
    assert len(engine.scheduler.parked) == BATCH
    finish(engine, ask([1], 1))
    assert [parked.tokens[0] for parked in engine.scheduler.parked] == [10, 20]
    engine, _ = make(blocks=4, context=64, **whole())
    for at in range(3):
        finish(engine, ask([10 * at], 2, reuse=True))
    finish(engine, ask([1], 40, ignore_eos=True))  # three blocks
    assert [parked.tokens[0] for parked in engine.scheduler.parked] == [20]


def test_the_longest_of_several_kept_sequences_is_taken() -> None:
    engine, _ = make(**whole())
    finish(engine, ask([1, 2, 3], 4, reuse=True))
    finish(engine, ask([1, 2], 1, reuse=True))  # newer, but shorter
    assert len(engine.scheduler.parked) == 2
    finish(engine, after := ask([1, 2, 3, 4, 5, 6, 9], 2, reuse=True))
    assert after.reused == 6


def test_nothing_is_kept_where_prompts_cannot_be_cut() -> None:
    """What goes on from a sequence is a piece of a prompt."""
    engine, _ = make(whole_prompts=True, **whole())
    finish(engine, ask([1, 2], 2, reuse=True))
    assert engine.scheduler.parked == []
    finish(engine, after := ask([1, 2, 3, 9], 2, reuse=True))
    assert (after.reused, after.token_ids) == (0, [10, 11])


@pytest.mark.parametrize("own", [False, True], ids=["states", "a cache of its own"])
@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_what_a_failure_may_have_spoilt_is_not_kept(own: bool, end: str) -> None:
    """A pass over the store changes nothing unless it succeeds; a model's own cache it damages."""
    engine, runner = make(**whole())
    request = ask([1, 2, 3], 9, reuse=True)

    def stop() -> None:
        if len(runner.runs) < 3:
            return
        if own:
            assert request.sequence is not None
            request.sequence.own = "damaged"
        if end == "failed":
            raise ReadError("gone")
        engine.cancel(request)

    runner.before = stop
    finish(engine, request)
    assert request.state.value == end
    kept = end == "cancelled" and not own
    assert [parked.tokens for parked in engine.scheduler.parked] == [[1, 2, 3, 4]] * kept


# --- who is refused


def test_no_more_than_the_queue_wait() -> None:
    engine, _ = make(queue=2)
    queue(engine, ask([1], 2), ask([2], 2))
    with pytest.raises(Overloaded, match="`2` requests") as caught:
        engine.add(ask([3], 2))
    assert caught.value.retry_after_s > 0
    assert "--queue" in caught.value.hint
    assert caught.value.exit_code == 3
    engine.step()
    queue(engine, last := ask([3], 2))
    finish(engine)
    assert last.token_ids == [4, 5]


class Ticking:
    """A clock that the network's passes move on by a second."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += 1.0


def busy_engine() -> tuple[Engine, Ticking]:
    """One that has learnt that every pass takes a second, and answers three requests."""
    clock = Ticking()
    engine, network = make(order=Emoe(Estimate()), clock=clock, blocks=200, context=64)
    network.before = clock.tick
    finish(engine, *(timed(clock, 1 + at % 3, 5) for at in range(30)))
    queue(engine, *(timed(clock, 1, 5) for _ in range(3)))
    engine.step()
    return engine, clock


def timed(clock: Ticking, prompt: int, count: int, first_s: float | None = None) -> Request:
    request = ask([1] * prompt, count)
    request.arrived = clock.now
    request.deadline = None if first_s is None else Deadline(first_s)
    return request


def test_who_cannot_be_served_in_time_is_refused_at_once() -> None:
    """A seat is free after four passes, and then comes the prompt's."""
    engine, clock = busy_engine()
    with pytest.raises(Overloaded, match="too much waits: the first token") as caught:
        engine.add(timed(clock, 1, 5, 4.0))
    assert 0 < caught.value.retry_after_s < 10
    assert len(engine.scheduler.waiting) == 0
    queue(engine, patient := timed(clock, 1, 5, 9.0), timed(clock, 1, 5))
    finish(engine)
    assert patient.in_time
    assert patient.first_token_s == 5.0


def test_times_are_those_of_the_clock() -> None:
    clock = Ticking()
    engine, network = make(clock=clock)
    network.before = clock.tick
    request, later = timed(clock, 9, 3), timed(clock, 4, 1)
    engine.add(request)
    for _ in range(3):
        engine.step()
    assert (request.first_token_s, request.longest_gap_s) == (3.0, 0.0)
    later.arrived = clock.now
    finish(engine, later)
    # Before its last token, the other one's prompt was read.
    assert request.longest_gap_s == 2.0
    assert request.last_token_at == 6.0
