"""Families with running states through the whole engine: together as alone, and conversations."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import models
import stores
from retinue import LLM
from retinue.engine.request import Request, State, new_request

COUNT = 8
PROMPTS = [models.prompt_of(length, seed=length) for length in (33, 5, 2, 60, 17)]


@pytest.fixture(scope="module", params=["qwen3_next", "granitemoehybrid", "lfm2_moe"])
def checkpoint(request: pytest.FixtureRequest, checkpoints: Path) -> Path:
    folder = checkpoints / f"hybrid-{request.param}"
    stores.build(request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    settings = {"context": 128, "kv_tokens": 512, "chunk": 16, "self_check": False}
    with models.open_llm(checkpoint, **settings) as opened:
        yield opened


def expected(checkpoint: Path, prompts: list[list[int]], count: int = COUNT) -> list[list[int]]:
    model = models.stock(checkpoint)
    return [models.stock_greedy(model, prompt, count) for prompt in prompts]


def requests_of(prompts: list[list[int]], *, reuse: bool = False) -> list[Request]:
    return [new_request(prompt, models.greedy(COUNT), None, reuse=reuse) for prompt in prompts]


def test_together_as_alone(checkpoint: Path, llm: LLM) -> None:
    requests = requests_of(PROMPTS)
    with models.recorded(llm) as passes:
        for _ in llm.serve(requests):
            pass
    assert [request.token_ids for request in requests] == expected(checkpoint, PROMPTS)
    sizes = {(each.phase, len(each.segments)) for each in passes}
    assert max(size for phase, size in sizes if phase == "decode") > 2
    assert max(size for phase, size in sizes if phase == "prefill") == 1


def test_with_a_quarter_of_the_experts(checkpoint: Path) -> None:
    settings = {"context": 128, "kv_tokens": 512, "self_check": False, "experts": "25%"}
    with models.open_llm(checkpoint, **settings) as few:
        outputs = few.generate(PROMPTS, models.greedy(COUNT), progress=False)
    assert [output.token_ids for output in outputs] == expected(checkpoint, PROMPTS)


def test_conversations_go_on_from_their_states(checkpoint: Path, llm: LLM) -> None:
    """Two at once, three turns: each one computes only what is new."""
    histories = [models.prompt_of(20, seed=31), models.prompt_of(26, seed=32)]
    stored = [0, 0]
    for turn in range(3):
        before = llm.assembly.metrics.total.prefill.tokens
        requests = requests_of(histories, reuse=True)
        for _ in llm.serve(requests):
            pass
        assert [request.token_ids for request in requests] == expected(checkpoint, histories)
        assert [request.reused for request in requests] == stored
        prefilled = llm.assembly.metrics.total.prefill.tokens - before
        assert prefilled == sum(map(len, histories)) - sum(stored)
        # All but the last new token was run.
        stored = [len(history) + COUNT - 1 for history in histories]
        more = models.prompt_of(3, seed=turn)
        histories = [r.tokens + more for r in requests]


def test_cancelled_neighbours_and_what_they_leave(checkpoint: Path, llm: LLM) -> None:
    """A cancelled answer may be gone on from; others take its blocks."""
    requests = requests_of(PROMPTS, reuse=True)
    for step, _ in enumerate(llm.serve(requests)):
        if step == 8:
            llm.assembly.engine.cancel(requests[1])
        if step == 9:
            llm.assembly.engine.cancel(requests[3])
    wanted = expected(checkpoint, PROMPTS)
    for request, tokens in zip(requests, wanted, strict=True):
        assert request.token_ids == tokens[: len(request.token_ids)]
    assert [requests[at].state for at in (1, 3)] == [State.CANCELLED] * 2
    assert requests[1].token_ids
    history = [[*requests[1].tokens, 9, 8, 7]]
    (after,) = requests_of(history, reuse=True)
    for _ in llm.serve([after]):
        pass
    assert after.reused == len(requests[1].tokens) - 1
    assert [after.token_ids] == expected(checkpoint, history)
