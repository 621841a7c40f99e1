"""The loop with a network that counts: the next token is the last one plus one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retinue.engine.engine import Engine
from retinue.engine.request import Request, State, new_request
from retinue.errors import Cancelled, ReadError, UsageError
from retinue.metrics import Metrics
from retinue.types import SamplingParams

VOCABULARY, CONTEXT, CHUNK, END = 100, 32, 4, 50


class Books:
    checks, balanced = 0, True

    def check(self) -> None:
        self.checks += 1
        assert self.balanced


class Host:
    def __init__(self) -> None:
        self.cache, self.closed = Books(), False
        self.stop: Callable[[], bool] = lambda: False
        self.tasks: list[list[str | None]] = []
        self.begin = self.tasks.append

    def close(self) -> None:
        self.closed = True


class Sequence:
    def __init__(self, context: int) -> None:
        self.context, self.length = context, 0

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


class Counting:
    """A runner that notes what it was asked. `before` is called in each run, and may raise."""

    def __init__(self) -> None:
        self.host = Host()
        self.runs: list[tuple[str, list[int], int]] = []  # phase, tokens, position
        self.before: Callable[[], None] = lambda: None

    def new_sequence(self, context: int) -> Sequence:
        return Sequence(context)

    def run(self, tokens: list[int], sequence: Sequence, phase: str) -> torch.Tensor:
        self.runs.append((phase, list(tokens), sequence.length))
        self.before()
        if self.host.stop():
            raise Cancelled("stopped in the middle of a layer")
        sequence.length += len(tokens)
        assert sequence.length <= sequence.context
        logits = torch.zeros(VOCABULARY)
        logits[(tokens[-1] + 1) % VOCABULARY] = 5.0
        return logits


class Letters:
    """A tokenizer whose token n is the letter chr(n + 32)."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(token + 32) for token in ids)


def make(**fields: Any) -> tuple[Engine, Counting]:
    runner = Counting()
    settings = {"context": CONTEXT, "chunk": CHUNK, "vocabulary": VOCABULARY}
    settings |= {"end_tokens": frozenset([END])} | fields
    return Engine(runner, Metrics(), **settings), runner  # type: ignore[arg-type]


def ask(prompt: list[int], count: int = 3, *, reuse: bool = False, **fields: Any) -> Request:
    params = SamplingParams(max_new_tokens=count, **fields)
    return new_request(prompt, params, Letters(), reuse=reuse)


def finish(engine: Engine, request: Request) -> str:
    engine.add(request)
    text = ""
    while not request.state.final:
        step = engine.step()
        assert step is not None
        text += step[1]
    engine.idle()
    return text


def test_a_prompt_runs_in_chunks_and_then_token_by_token() -> None:
    engine, runner = make()
    request = ask([1, 2, 3, 4, 5, 6, 7, 8, 9], 3)
    finish(engine, request)
    assert runner.runs == [
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
    assert engine.step() is None


def test_requests_run_in_the_order_of_arrival() -> None:
    engine, _ = make()
    requests = [ask([i], 2) for i in (30, 10, 20)]
    for request in requests:
        engine.add(request)
    seen: list[Request] = []
    while (step := engine.step()) is not None:
        seen.append(step[0])
    assert [requests.index(request) for request in seen] == [0, 0, 1, 1, 2, 2]
    assert [request.token_ids for request in requests] == [[31, 32], [11, 12], [21, 22]]


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
    assert [tokens for _, tokens, _ in runner.runs] == [[1], [70], [60]]


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
    assert not any(tokens == [10] for _, tokens, _ in runner.runs)
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
    after = ask([1] * 12, 1, reuse=True)
    runner.before = lambda: None
    finish(engine, after)
    assert after.reused == (0 if phase == "prefill" else 11)
    assert after.token_ids == [2]


def test_stop_is_about_the_running_request_alone() -> None:
    engine, runner = make()
    first, second = ask([1], 2), ask([5], 2)
    engine.add(first)
    engine.add(second)
    engine.step()
    engine.cancel(second)
    assert not runner.host.stop()
    engine.cancel(first)
    assert runner.host.stop()
    while engine.busy:
        engine.step()
    assert not runner.host.stop()


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


def test_a_foreign_error_comes_through_and_ends_the_request() -> None:
    engine, runner = make()
    request = ask([1], 2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    runner.before = interrupt
    engine.add(request)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert request.state is State.FAILED
    runner.before = lambda: None
    engine.idle()
    finish(engine, after := ask([5], 1))
    assert after.token_ids == [6]


# --- what one request leaves for the next


@pytest.mark.parametrize(
    ("prompt", "reused"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 8),  # stored: the prompt and two of three new tokens
        ([1, 2, 3, 4, 5, 6, 7], 6),
        ([1, 2, 3, 4, 5, 6, 7, 8], 7),
        ([1, 2, 9, 9], 2),
        ([1], 0),
        ([7, 8], 0),
    ],
)
def test_how_much_of_a_prefix_is_reused(prompt: list[int], reused: int) -> None:
    engine, runner = make()
    finish(engine, ask([1, 2, 3, 4, 5, 6], 3))
    runner.runs.clear()
    request = ask(prompt, 1, reuse=True)
    finish(engine, request)
    assert request.reused == reused
    assert runner.runs[0][2] == reused
    ran = [token for _, tokens, _ in runner.runs for token in tokens]
    assert ran == prompt[reused:]
    assert request.token_ids == [prompt[-1] + 1]


def test_nothing_is_reused_unless_asked() -> None:
    engine, runner = make()
    finish(engine, ask([1, 2, 3], 3))
    runner.runs.clear()
    request = ask([1, 2, 3], 1)
    finish(engine, request)
    assert request.reused == 0
    assert runner.runs == [("prefill", [1, 2, 3], 0)]


def test_counters_begin_anew_with_each_request() -> None:
    engine, runner = make()
    metrics = engine.metrics
    runner.before = lambda: setattr(metrics.prefill, "tokens", metrics.prefill.tokens + 1)
    finish(engine, ask([1], 1))
    finish(engine, ask([1], 1))
    assert metrics.prefill.tokens == 1


def test_idle_checks_the_books() -> None:
    engine, runner = make()
    finish(engine, ask([1], 1))
    assert runner.host.cache.checks == 1
    runner.host.cache.balanced = False
    with pytest.raises(AssertionError):
        engine.idle()


def test_idle_notices_a_sequence_that_was_not_cut_back() -> None:
    engine, _ = make()
    finish(engine, ask([1, 2, 3], 1))
    engine._sequence.truncate(1)
    with pytest.raises(AssertionError):
        engine.idle()


def test_close_lets_go_of_the_network() -> None:
    engine, runner = make()
    engine.close()
    assert runner.host.closed
