"""Many requests at once through the whole engine: in float32 each one's tokens are those it gets
alone, whatever runs beside it, fails beside it, or lies between its blocks."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from retinue import LLM
from retinue.engine import blocks
from retinue.engine.request import Request, State, new_request
from retinue.errors import NotFinite, ReadError
from retinue.memory.files import Reader
from retinue.memory.home import sample_folder
from retinue.types import BLOCK_TOKENS

COUNT = 10  # new tokens of each
PROMPTS = [models.prompt_of(length, seed=length) for length in (33, 5, 1, 60, 17, 48, 9)]
SLIDING = {
    "mixtral": {"sliding_window": 8},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "gpt_oss": {"sliding_window": 8},
}
KINDS = (
    "olmoe",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "sample",
    *(f"{name}, window" for name in SLIDING),
)


def make(checkpoints: Path, kind: str) -> Path:
    folder = checkpoints / f"batching-{kind.replace(', ', '-')}"
    if kind == "sample":
        whole = models.rewrite(
            sample_folder(), folder, lambda each: {n: tensor.float() for n, tensor in each.items()}
        )
        return models.edit_config(whole, dtype="float32")
    family, _, window = kind.partition(", ")
    return models.make(folder, family, **(SLIDING[family] if window else {}))


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, checkpoints: Path) -> Path:
    return make(checkpoints, request.param)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """What the plain model answers to each prompt."""
    return plain_answers(checkpoint, PROMPTS)


def plain_answers(
    folder: Path, prompts: Sequence[list[int]], count: int = COUNT
) -> list[list[int]]:
    model = models.stock(folder)
    return [models.stock_greedy(model, prompt, count) for prompt in prompts]


def open_llm(folder: Path, **settings: Any) -> LLM:
    """With room for all prompts at once, which take several prefill passes."""
    return models.open_llm(
        folder,
        **({"chunk": 16, "context": 256, "kv_tokens": 1024, "self_check": False} | settings),
    )


def requests_of(
    prompts: Sequence[list[int]], count: int = COUNT, *, reuse: bool = False
) -> list[Request]:
    return [new_request(prompt, models.greedy(count), None, reuse=reuse) for prompt in prompts]


def serve(llm: LLM, requests: list[Request], after: Callable[[int], None] = lambda _: None) -> None:
    """Run to the end; `after` is called with the number of each step."""
    for step, _ in enumerate(llm.serve(requests)):
        after(step)
    llm.assembly.engine.idle()


def shuffled(each: Iterable[int]) -> list[int]:
    found = list(each)
    return random.Random(3).sample(found, len(found))


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are handed out in any order, hardly as neighbours."""
    monkeypatch.setattr(blocks, "sorted", shuffled, raising=False)


# --- equal tokens


@pytest.mark.parametrize("experts", ["100%", "50%", "25%"])
def test_together_as_alone(checkpoint: Path, expected: list[list[int]], experts: str) -> None:
    with open_llm(checkpoint, experts=experts) as llm, models.recorded(llm) as passes:
        requests = requests_of(PROMPTS)
        serve(llm, requests)
        alone = llm.generate(PROMPTS[0], models.greedy(COUNT))[0]
    assert [request.token_ids for request in requests] == expected
    assert alone.token_ids == expected[0]
    # They did run together, in pieces of prompts and beside pieces of prompts.
    assert max(len(each.segments) for each in passes if each.phase == "prefill") > 1
    if experts == "100%":
        assert max(len(each.segments) for each in passes if each.phase == "decode") > 3
    phases = [each.phase for each in passes]
    assert ("decode", "prefill") in pairwise(phases)
    assert max(sum(len(s.tokens) for s in each.segments) for each in passes) <= 16


@pytest.mark.usefixtures("scattered")
def test_together_in_scattered_blocks(checkpoint: Path, expected: list[list[int]]) -> None:
    with open_llm(checkpoint) as llm, models.recorded(llm) as passes:
        requests = requests_of(PROMPTS)
        serve(llm, requests)
    assert [request.token_ids for request in requests] == expected
    assert any(s.sequence.first is None for each in passes for s in each.segments)


def test_few_blocks_and_a_small_batch(checkpoint: Path, expected: list[list[int]]) -> None:
    """Most requests wait, and get blocks that others have used."""
    context = max(map(len, PROMPTS)) + COUNT
    with open_llm(checkpoint, context=context, kv_tokens=96, batch=3) as llm:
        requests = requests_of(PROMPTS)
        serve(llm, requests)
    assert [request.token_ids for request in requests] == expected


def test_where_blocks_lie_changes_no_bit(olmoe: Path) -> None:
    """Nor what others have left in them: logits of one request."""
    prompt, forced = PROMPTS[3], PROMPTS[4]
    with open_llm(olmoe) as llm:
        first = models.run_logits(llm, prompt, forced)
        serve(llm, requests_of(PROMPTS))
        assert torch.equal(models.run_logits(llm, prompt, forced), first)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "sorted", shuffled, raising=False)
            with models.recorded(llm) as passes:
                again = models.run_logits(llm, prompt, forced)
        assert all(s.sequence.first is None for each in passes for s in each.segments)
        assert torch.equal(again, first)


# --- shared prefixes


def test_a_long_common_prefix_is_computed_once(checkpoints: Path) -> None:
    folder = models.make(checkpoints / "batching-long", max_position_embeddings=1024)
    system = models.prompt_of(16 * BLOCK_TOKENS + 7, seed=77)
    prompts = [system + models.prompt_of(4 + at, seed=at) for at in range(5)]
    expected = plain_answers(folder, prompts, 6)
    with open_llm(folder, chunk=64, kv_tokens=4096, context=512) as llm:
        outputs = llm.generate(prompts, models.greedy(6), progress=False)
        prefilled = llm.assembly.metrics.total.prefill.tokens
        assert [output.token_ids for output in outputs] == expected
        assert [output.stats.reused_tokens for output in outputs] == [0] + [256] * 4
        assert prefilled == sum(map(len, prompts)) - 4 * 256
        apart = llm.generate(prompts, models.greedy(6), progress=False, reuse=False)
        assert [output.token_ids for output in apart] == expected
        assert [output.stats.reused_tokens for output in apart] == [0] * 5


def test_a_common_prefix_of_those_before_is_not_computed_again(
    checkpoint: Path, expected: list[list[int]]
) -> None:
    """A system prompt of 100 tokens and more; scattered blocks, in every family."""
    system = models.prompt_of(110, seed=78)
    prompts = [system + prompt[:20] for prompt in PROMPTS]
    wanted = plain_answers(checkpoint, prompts)
    assert wanted != expected
    with open_llm(checkpoint) as llm:
        serve(llm, requests_of(prompts[:1], reuse=True))
        before = llm.assembly.metrics.total.prefill.tokens
        requests = requests_of(prompts[1:], reuse=True)
        serve(llm, requests)
        prefilled = llm.assembly.metrics.total.prefill.tokens - before
    assert [request.token_ids for request in requests] == wanted[1:]
    assert [request.reused for request in requests] == [96] * (len(prompts) - 1)
    assert prefilled == sum(len(prompt) - 96 for prompt in prompts[1:])


# --- neighbours that end early


def test_cancelled_neighbours(checkpoint: Path, expected: list[list[int]]) -> None:
    """One while it waits, one in its prompt, one in its answer; another one takes their blocks."""
    with open_llm(checkpoint, batch=5) as llm:
        requests = requests_of(PROMPTS)

        def cancel(step: int) -> None:
            for at, when in ((6, 0), (3, 4), (1, 9)):
                if step == when:
                    llm.assembly.engine.cancel(requests[at])

        serve(llm, requests, cancel)
    for at, request in enumerate(requests):
        assert request.state is (State.CANCELLED if at in (1, 3, 6) else State.DONE)
        assert request.token_ids == expected[at][: len(request.token_ids)]
    assert [len(requests[at].token_ids) for at in (0, 2, 4, 5)] == [COUNT] * 4
    assert requests[1].token_ids


def test_only_those_who_touch_a_damaged_expert_fail(olmoe: Path, tmp_path: Path) -> None:
    def damage(tensors: models.Tensors) -> models.Tensors:
        (name,) = (n for n in tensors if "layers.1.mlp.experts.3.down_proj" in n)
        return tensors | {name: tensors[name].clone().fill_(torch.nan)}

    folder = models.rewrite(olmoe, tmp_path / "damaged", damage)
    prompts = [models.prompt_of(1 + seed % 3, seed) for seed in range(8)]
    expected = plain_answers(olmoe, prompts, 3)
    with open_llm(folder, preset="on-demand") as llm:
        alone = requests_of(prompts, 3)
        for request in alone:
            with suppress(NotFinite):
                serve(llm, [request])
        together = requests_of(prompts, 3)
        with pytest.raises(NotFinite, match="expert 3 of layer 1"):
            serve(llm, together)
        llm.assembly.engine.idle()
    states = [request.state for request in alone]
    for request in (*alone, *together):
        assert request.error is None or "expert 3 of layer 1" in str(request.error)
    assert {State.DONE, State.FAILED} == set(states)
    assert [request.state for request in together] == states
    assert [request.token_ids for request in together] == [request.token_ids for request in alone]
    for request, tokens in zip(together, expected, strict=True):
        assert request.token_ids == tokens[: len(request.token_ids)]
        assert (request.state is State.DONE) == (len(request.token_ids) == 3)


class Failing(Reader):
    """A disk whose reads fail when `broken` says so."""

    broken: Callable[[], bool] = staticmethod(lambda: False)

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        if self.broken():
            raise ReadError(f"cannot read `{file}`: Input/output error", hint="check the disk")
        return super().read(file, offset, into, direct=direct)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Failing]]:
    monkeypatch.setattr("retinue.engine.assembly.Reader", Failing)
    yield Failing
    Failing.broken = staticmethod(lambda: False)


@pytest.mark.parametrize("first", [0, 60], ids=["prefill", "decode"])
def test_a_read_that_fails_once_fails_nobody(
    olmoe: Path, failing: type[Failing], first: int
) -> None:
    """The pass is tried again, for each of its requests."""
    expected = plain_answers(olmoe, PROMPTS)
    with open_llm(olmoe, experts="50%", preset="on-demand", chunk=256) as llm:
        reads, failed = iter(range(10**6)), []

        def broken() -> bool:
            fails = next(reads) == first
            failed.extend([True] * fails)
            return fails

        failing.broken = staticmethod(broken)
        requests = requests_of(PROMPTS)
        serve(llm, requests)
    assert failed
    assert [request.token_ids for request in requests] == expected


def test_a_disk_that_stays_broken_fails_all_and_the_engine_goes_on(
    olmoe: Path, failing: type[Failing]
) -> None:
    with open_llm(olmoe, experts="25%") as llm:
        failing.broken = staticmethod(lambda: True)
        requests = requests_of(PROMPTS[:4])
        with pytest.raises(ReadError):
            serve(llm, requests)
        assert [request.state for request in requests] == [State.FAILED] * 4
        llm.assembly.engine.idle()
        failing.broken = staticmethod(lambda: False)
        serve(llm, again := requests_of(PROMPTS[:4]))
    assert [request.token_ids for request in again] == plain_answers(olmoe, PROMPTS[:4])


# --- chance


@pytest.mark.parametrize("experts", ["100%", "25%"])
def test_a_hundred_requests_with_random_cancels(olmoe: Path, experts: str) -> None:
    """They come while others run; every one ends, and what it has said is right."""
    chance = random.Random(11)
    beginnings = [models.prompt_of(40, seed=at) for at in range(3)]
    prompts = []
    for seed in range(50):
        start = chance.choice(beginnings)[: chance.choice((0, 0, 16, 40))]
        prompts.append(start + models.prompt_of(chance.randint(1, 25), seed))
    answers = plain_answers(olmoe, prompts, 8)
    # Each prompt twice: the second time much of it may be there.
    requests = requests_of(prompts, 8, reuse=True) + requests_of(prompts, 5, reuse=True)
    order = chance.sample(requests, len(requests))
    with open_llm(olmoe, experts=experts, context=128, kv_tokens=320, batch=5) as llm:
        engine = llm.assembly.engine
        coming = list(order)
        while coming or engine.busy:
            for _ in range(chance.choice((0, 1, 4))):
                if coming:
                    engine.add(coming.pop())
            if chance.random() < 0.25:
                engine.cancel(chance.choice(order))
            if not engine.busy:
                continue
            moved = engine.step()
            assert len(moved) == len(set(moved))
            engine.scheduler.check()
            assert len(engine.scheduler.running) <= 5
        engine.idle()
    wanted = dict(zip(requests, [*answers, *(tokens[:5] for tokens in answers)], strict=True))
    for request, tokens in wanted.items():
        if request.state is State.DONE:
            assert request.token_ids == tokens
        else:
            assert request.state is State.CANCELLED
            assert request.token_ids == tokens[: len(request.token_ids)]
    states = [request.state for request in requests]
    assert states.count(State.DONE) > 40
    assert states.count(State.CANCELLED) > 10
    assert sum(request.reused > 0 for request in requests) > 10
