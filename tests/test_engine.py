"""The loop with a network that counts: the next token is the last one plus one."""

import pytest

from fakes import CONTEXT, END, VOCABULARY, ask, finish, make
from retinue.engine.request import Request, State, new_request
from retinue.errors import ReadError, UsageError
from retinue.types import SamplingParams


def test_a_prompt_runs_in_chunks_and_then_token_by_token() -> None:
    engine, runner = make()
    request = ask([1, 2, 3, 4, 5, 6, 7, 8, 9], 3)
    finish(engine, request)
    assert runner.ran == [
        ("prefill", [1, 2, 3, 4], 0),
        ("prefill", [5, 6, 7, 8], 4),
        ("prefill", [9], 8),
        ("decode", [10], 9),
        ("decode", [11], 10),
    ]
    assert request.token_ids == [10, 11, 12]
    assert (request.state, request.finish_reason) == (State.DONE, "length")
    assert request.first_token_s > 0


def test_states_on_the_way() -> None:
    engine, _ = make()
    request = ask([1] * 5, 2)
    engine.add(request)
    states = [request.state]
    while engine.busy:
        engine.step()
        states.append(request.state)
    assert states == [State.WAITING, State.PREFILL, State.DECODE, State.DONE]
    assert engine.step() == []


def test_one_at_a_time_they_run_in_the_order_of_arrival() -> None:
    engine, _ = make(batch=1)
    requests = [ask([i], 2) for i in (30, 10, 20)]
    for request in requests:
        engine.add(request)
    seen: list[Request] = []
    while moved := engine.step():
        seen += moved
    assert [requests.index(request) for request in seen] == [0, 0, 1, 1, 2, 2]
    assert [request.token_ids for request in requests] == [[31, 32], [11, 12], [21, 22]]


def test_requests_share_their_passes() -> None:
    engine, runner = make()
    requests = [ask([30], 2), ask([10], 3), ask([20], 1)]
    finish(engine, *requests)
    assert runner.runs == [
        ("prefill", [([30], 0), ([10], 0), ([20], 0)]),
        ("decode", [([31], 1), ([11], 1)]),
        ("decode", [([12], 2)]),
    ]
    assert [request.token_ids for request in requests] == [[31, 32], [11, 12, 13], [21]]


def test_passes_are_separate_where_the_network_says_so() -> None:
    engine, runner = make(apart=True)
    requests = [ask([30], 2), ask([10], 2)]
    finish(engine, *requests)
    assert [phase for phase, _, _ in runner.ran] == ["prefill", "prefill", "decode", "decode"]
    assert [request.token_ids for request in requests] == [[31, 32], [11, 12]]


def test_a_pass_counts_for_each_of_its_requests_with_their_own_tokens() -> None:
    engine, _ = make(chunk=8)
    first, second = ask([1, 2, 3], 3), ask([5, 6], 2)
    finish(engine, first, second)
    assert [r.costs.prefill.tokens for r in (first, second)] == [3, 2]
    # The fake pass takes a second; telling the host of the tasks takes a moment.
    seconds = [r.costs.prefill.seconds for r in (first, second)]
    assert seconds == pytest.approx([1.0, 1.0], abs=0.1)
    assert [r.costs.decode.tokens for r in (first, second)] == [2, 1]
    seconds = [r.costs.decode.seconds for r in (first, second)]
    assert seconds == pytest.approx([2.0, 1.0], abs=0.1)


def test_step_hands_out_the_text_that_is_new() -> None:
    engine, _ = make()
    request = ask([ord("a") - 33], 4)
    assert finish(engine, request) == "abcd"


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ([], "empty"),
        ([1] * CONTEXT, "32 tokens, the context only 32"),
        ([1, VOCABULARY], "out of range: `100`"),
        ([-1], "out of range: `-1`"),
    ],
)
def test_prompts_that_can_never_run_are_refused(prompt: list[int], what: str) -> None:
    engine, runner = make()
    with pytest.raises(UsageError, match=what) as caught:
        engine.add(ask(prompt))
    assert caught.value.hint
    assert not engine.busy
    assert runner.runs == []


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    engine, _ = make()
    request = ask([1] * (CONTEXT - 1), 9)
    finish(engine, request)
    assert (request.token_ids, request.finish_reason) == ([2], "length")


def test_a_full_context_ends_the_answer() -> None:
    engine, _ = make()
    request = ask([1] * (CONTEXT - 4), 99)
    finish(engine, request)
    assert len(request.token_ids) == 4
    assert request.finish_reason == "length"


def test_the_end_token_ends_the_answer_and_is_part_of_its_ids() -> None:
    engine, _ = make()
    request = ask([END - 3], 9)
    finish(engine, request)
    assert request.token_ids == [END - 2, END - 1, END]
    assert (request.state, request.finish_reason) == (State.DONE, "stop")


def test_the_end_token_as_the_last_one_allowed_is_a_stop() -> None:
    engine, _ = make()
    request = ask([END - 1], 1)
    finish(engine, request)
    assert request.finish_reason == "stop"


def test_end_tokens_can_be_ignored() -> None:
    engine, _ = make()
    request = ask([END - 2], 5, ignore_eos=True)
    finish(engine, request)
    assert request.token_ids == [END - 1, END, END + 1, END + 2, END + 3]
    assert request.finish_reason == "length"


def test_a_stop_string_ends_the_answer() -> None:
    engine, _ = make()
    request = ask([ord("a") - 33], 20, stop="cd", ignore_eos=True)
    assert finish(engine, request) == request.text.text == "ab"
    assert request.finish_reason == "stop"
    assert [chr(token + 32) for token in request.token_ids] == ["a", "b", "c", "d"]


def test_forced_ids_replace_sampling() -> None:
    engine, runner = make()
    request = new_request([1], SamplingParams(max_new_tokens=3), None, forced=[70, 60, 80])
    finish(engine, request)
    assert request.token_ids == [70, 60, 80]
    assert [tokens for _, tokens, _ in runner.ran] == [[1], [70], [60]]


def test_logprobs_for_every_new_token() -> None:
    engine, _ = make()
    request = ask([1], 3, logprobs=1)
    finish(engine, request)
    assert [entry.token_id for entry in request.logprobs] == [2, 3, 4]
    assert [entry.top[0][0] for entry in request.logprobs] == [2, 3, 4]


# --- cancelling


def test_cancel_while_it_waits() -> None:
    engine, runner = make()
    first, second, third = ask([1], 2), ask([10], 2), ask([20], 2)
    for request in (first, second, third):
        engine.add(request)
    engine.cancel(second)
    while engine.busy:
        engine.step()
    assert (second.state, second.finish_reason) == (State.CANCELLED, "cancelled")
    assert second.token_ids == []
    assert third.token_ids == [21, 22]
    assert not any(([10], 0) in parts for _, parts in runner.runs)
    engine.idle()


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_cancel_between_steps(steps: int) -> None:
    """After one chunk of the prompt, at its end, and among the new tokens."""
    engine, runner = make()
    request = ask([1] * 12, 9)
    engine.add(request)
    for _ in range(steps):
        engine.step()
    state = request.state
    assert state is (State.PREFILL if steps == 1 else State.DECODE)
    engine.cancel(request)
    engine.step()
    assert (request.state, request.finish_reason) == (State.CANCELLED, "cancelled")
    assert len(runner.runs) == steps
    assert len(request.token_ids) == max(0, steps - 2)
    engine.idle()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_cancel_in_the_middle_of_a_run(phase: str) -> None:
    """The running network asks `stop`, and the sequence is as it was before that run."""
    engine, runner = make()
    request = ask([1] * 12, 9)

    def cancel() -> None:
        if runner.runs[-1][0] == phase:
            engine.cancel(request)

    runner.before = cancel
    finish(engine, request)
    assert request.state is State.CANCELLED
    assert request.done == (0 if phase == "prefill" else 12)
    runner.before = lambda: None
    finish(engine, after := ask([1] * 12, 1, reuse=True))
    assert after.token_ids == [2]


def test_a_pass_stops_only_when_nobody_wants_it() -> None:
    engine, runner = make()
    first, second = ask([1], 4), ask([5], 4)
    stops: list[bool] = []

    def cancel(*requests: Request) -> None:
        stops.append(runner.host.stop())
        for request in requests:
            engine.cancel(request)
        stops.append(runner.host.stop())

    plans = iter([[], [first], [second]])
    runner.before = lambda: cancel(*next(plans))
    finish(engine, first, second)
    assert stops == [False, False, False, False, False, True]
    assert not runner.host.stop(), "what runs the network next is no pass of theirs"
    # The pass in which the first one was cancelled went on for the second one.
    assert [request.token_ids for request in (first, second)] == [[2, 3], [6, 7]]
    assert first.state is second.state is State.CANCELLED


def test_a_cancelled_neighbour_changes_no_answer() -> None:
    engine, runner = make()
    requests = [ask([1] * 6, 8), ask([20] * 3, 8), ask([40] * 9, 8, ignore_eos=True)]
    runner.before = lambda: engine.cancel(requests[1]) if len(runner.runs) == 4 else None
    finish(engine, *requests)
    assert [request.state for request in requests] == [State.DONE, State.CANCELLED, State.DONE]
    assert requests[0].token_ids == list(range(2, 10))
    assert requests[2].token_ids == list(range(41, 49))


def test_a_cancel_before_the_first_step() -> None:
    engine, runner = make()
    engine.cancel(request := ask([1], 2))
    finish(engine, request)
    assert request.state is State.CANCELLED
    assert runner.runs == []


# --- errors


def test_an_error_fails_the_request_and_not_the_engine() -> None:
    engine, runner = make()
    error = ReadError("the disk is gone")

    def fail() -> None:
        if len(runner.runs) == 4:
            raise error

    runner.before = fail
    request, following = ask([1] * 8, 9), ask([30], 2)
    finish(engine, request)
    assert (request.state, request.finish_reason) == (State.FAILED, "error")
    assert request.error is error
    assert request.token_ids == [2, 3]
    finish(engine, following)
    assert following.token_ids == [31, 32]


def test_what_a_foreign_error_has_stopped_is_tried_again() -> None:
    """Whoever called ends its own requests; here nobody does."""
    engine, runner = make()
    request = ask([1], 2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    runner.before = interrupt
    engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert not request.state.final
    runner.before = lambda: None
    while engine.busy:
        engine.step()
    engine.idle()
    assert request.token_ids == [2, 3]


def test_a_foreign_error_ends_a_request_whose_own_cache_it_has_damaged() -> None:
    engine, runner = make()
    request = ask([1], 2)

    def interrupt() -> None:
        assert request.sequence is not None
        request.sequence.own = object()
        raise KeyboardInterrupt

    runner.before = interrupt
    engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert (request.state, request.finish_reason) == (State.FAILED, "error")
    engine.idle()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_error_fails_only_those_whose_own_pass_fails(phase: str) -> None:
    """A pass that fails for several is tried again for each one alone."""
    engine, runner = make(chunk=8)
    requests = [ask([1, 2], 4), ask([20, 21], 4), ask([40, 41], 4)]

    def fail() -> None:
        of, parts = runner.runs[-1]
        if of == phase and any(20 <= tokens[-1] < 30 for tokens, _ in parts):
            raise ReadError("that expert cannot be read")

    runner.before = fail
    finish(engine, *requests)
    assert [request.state for request in requests] == [State.DONE, State.FAILED, State.DONE]
    assert [request.token_ids for request in requests] == [
        [3, 4, 5, 6],
        [] if phase == "prefill" else [22],
        [42, 43, 44, 45],
    ]
    assert [len(parts) for of, parts in runner.runs if of == phase][:4] == [3, 1, 1, 1]


def test_an_error_that_passes_fails_nobody() -> None:
    engine, runner = make()

    def fail() -> None:
        if len(runner.runs) == 3:
            raise ReadError("once")

    runner.before = fail
    requests = [ask([1], 5), ask([20], 5)]
    finish(engine, *requests)
    assert [request.token_ids for request in requests] == [
        list(range(2, 7)),
        list(range(21, 26)),
    ]
    assert [request.error for request in requests] == [None, None]


# --- the books


def test_idle_checks_the_books() -> None:
    engine, runner = make()
    finish(engine, ask([1], 1))
    assert runner.host.cache.checks == 1
    runner.host.cache.balanced = False
    with pytest.raises(AssertionError):
        engine.idle()


def test_idle_notices_a_block_that_is_lost() -> None:
    engine, _ = make()
    finish(engine, ask([1, 2, 3], 1))
    engine.scheduler.pool.take([1, 2, 3], 3, reuse=False)
    with pytest.raises(AssertionError):
        engine.idle()


def test_idle_is_not_while_something_runs() -> None:
    engine, _ = make()
    engine.add(ask([1]))
    with pytest.raises(AssertionError):
        engine.idle()


def test_close_lets_go_of_the_network() -> None:
    engine, runner = make()
    engine.close()
    assert runner.host.closed
