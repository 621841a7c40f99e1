"""What one request leaves for the next: blocks of equal prefixes, with a network that counts."""

import pytest

from fakes import VOCABULARY, ask, finish, make
from retinue.engine.request import State
from retinue.errors import ReadError
from retinue.types import BLOCK_TOKENS

BLOCKS = [token % VOCABULARY for token in range(BLOCK_TOKENS * 4)]


@pytest.mark.parametrize(
    ("prompt", "reused"),
    [
        (BLOCKS[:45], 32),  # stored: the prompt of 40 and four of five new tokens
        (BLOCKS[:49], 48),  # the answer went on as this prompt does, and 48 tokens were run
        (BLOCKS[:48], 32),  # the last token of a prompt is always run
        (BLOCKS[:33], 32),
        (BLOCKS[:32], 16),
        ([*BLOCKS[:20], 9, 9], 16),
        ([9, *BLOCKS[1:40]], 0),
        (BLOCKS[:7], 0),
    ],
)
def test_how_much_of_a_prefix_is_reused(prompt: list[int], reused: int) -> None:
    engine, runner = make(context=80)
    finish(engine, ask(BLOCKS[:40], 9, ignore_eos=True))
    runner.runs.clear()
    request = ask(prompt, 1, reuse=True)
    finish(engine, request)
    assert request.reused == reused
    assert runner.ran[0][2] == reused
    ran = [token for _, tokens, _ in runner.ran for token in tokens]
    assert ran == prompt[reused:]
    assert request.token_ids == [prompt[-1] + 1]


def test_nothing_is_reused_unless_asked() -> None:
    engine, runner = make(context=80)
    finish(engine, ask(BLOCKS[:40], 3))
    runner.runs.clear()
    request = ask(BLOCKS[:40], 1)
    finish(engine, request)
    assert request.reused == 0
    assert runner.ran[0] == ("prefill", BLOCKS[:4], 0)


@pytest.mark.parametrize(
    "end", [State.DONE, State.CANCELLED, State.FAILED], ids=lambda state: state.value
)
def test_what_a_request_leaves_behind(end: State) -> None:
    """Whatever was computed serves the next one, but for what a failure may have spoilt."""
    engine, runner = make(context=80, chunk=16)
    first = ask(BLOCKS[:40], 4)

    def stop() -> None:
        if len(runner.runs) == 3 and end is State.CANCELLED:
            engine.cancel(first)
        if len(runner.runs) == 3 and end is State.FAILED:
            raise ReadError("the disk is gone")

    runner.before = stop
    finish(engine, first)
    assert first.state is end
    finish(engine, after := ask(BLOCKS[:40], 2, reuse=True))
    assert after.reused == (0 if end is State.FAILED else 32)
    assert after.token_ids == [40, 41]


def test_a_common_prefix_is_computed_while_the_others_wait() -> None:
    """Worth it from 16 blocks on; the answers are the same as without sharing."""
    prefix = [token % 90 for token in range(16 * BLOCK_TOKENS)]
    prompts = [[*prefix, 90 + at, 3, at] for at in range(3)]
    engine, runner = make(blocks=80, context=400, chunk=64, batch=4)
    requests = [ask(prompt, 3, reuse=True) for prompt in prompts]
    finish(engine, *requests)
    assert [request.reused for request in requests] == [0, len(prefix), len(prefix)]
    ran = sum(
        len(tokens) for phase, parts in runner.runs if phase == "prefill" for tokens, _ in parts
    )
    assert ran == len(prefix) + 3 * 3
    assert [request.token_ids for request in requests] == [
        [at + 1, at + 2, at + 3] for at in range(3)
    ]


@pytest.mark.parametrize("way", ["cancelled", "failed"])
def test_those_who_wait_for_a_prefix_go_on_if_it_never_comes(way: str) -> None:
    prefix = [token % 90 for token in range(16 * BLOCK_TOKENS)]
    engine, runner = make(blocks=80, context=400, chunk=64, batch=4)
    first, second = (ask([*prefix, 90 + at], 2, reuse=True) for at in range(2))

    def end() -> None:
        if len(runner.runs) == 2 and way == "failed":
            raise ReadError("gone")
        if len(runner.runs) == 2:
            engine.cancel(first)

    runner.before = end
    finish(engine, first, second)
    assert (first.state, second.state) == (State(way), State.DONE)
    assert second.reused == (64 if way == "cancelled" else 0)
    assert second.token_ids == [92, 93]
