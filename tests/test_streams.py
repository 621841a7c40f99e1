"""Several streams at once: each one's last output comes, whoever ran the step that ended it."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from models import greedy, open_llm, prompt_of
from retinue import LLM, Deadline, Overloaded
from retinue.policy.order.base import Job, Queues


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with open_llm("sample", context=128) as opened:
        yield opened


def test_a_stream_that_another_ones_step_has_ended_still_gives_its_last_output(llm: LLM) -> None:
    short, long = llm.stream(prompt_of(6), greedy(3)), llm.stream(prompt_of(7), greedy(24))
    first = next(short)
    assert [output.finish_reason for output in long][-1] == "length"
    rest = list(short)
    assert [output.finish_reason for output in rest] == ["length"]
    assert first.delta + rest[0].delta == rest[0].text
    assert len(rest[0].token_ids) == 3
    assert rest[0].stats.budget_bytes > 0


def test_a_cancelled_stream_says_so_though_another_one_was_closed_meanwhile(llm: LLM) -> None:
    kept, left = llm.stream(prompt_of(6), greedy(24)), llm.stream(prompt_of(7), greedy(24))
    next(kept), next(left)
    llm.cancel()
    del left
    (last,) = kept
    assert last.finish_reason == "cancelled"
    assert llm.assembly.engine.busy is False


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a mistake of ours")])
def test_a_stream_goes_on_after_another_one_was_interrupted_in_a_pass_of_both(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (plain,) = llm.generate(prompt_of(6), greedy(12), progress=False)
    kept, stopped = llm.stream(prompt_of(6), greedy(12)), llm.stream(prompt_of(7), greedy(12))
    next(kept), next(stopped)
    with monkeypatch.context() as patch:
        patch.setattr(llm.assembly.host, "watch", _raiser(error))
        with pytest.raises(type(error)):
            list(stopped)
    *_, last = kept
    assert last.finish_reason == "length"
    assert last.token_ids == plain.token_ids
    assert llm.assembly.engine.busy is False


def test_more_prompts_than_may_wait_are_queued_as_others_run(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llm.assembly.engine
    few = replace(engine.limits, queue=2, batch=1)
    monkeypatch.setattr(engine, "limits", few)
    monkeypatch.setattr(engine.scheduler, "limits", few)
    outputs = llm.generate([prompt_of(4, seed) for seed in range(6)], greedy(2), progress=False)
    assert [len(output.token_ids) for output in outputs] == [2] * 6
    streams = [llm.stream(prompt_of(4, seed), greedy(2)) for seed in range(6)]
    assert [[*stream][-1].finish_reason for stream in streams] == ["length"] * 6


def test_what_is_refused_is_raised_after_the_others_were_answered(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = llm.assembly.engine.scheduler.order
    seen: list[Job] = []

    def refuse(job: Job, queues: Queues) -> float | None:
        seen.append(job)
        return 1.5 if len(seen) == 2 else None

    monkeypatch.setattr(order, "refuse", refuse)
    prompts = [prompt_of(4, seed) for seed in range(3)]
    with pytest.raises(Overloaded) as caught:
        llm.generate(prompts, greedy(2), deadline=Deadline(9.0), progress=False)
    assert caught.value.retry_after_s == 1.5
    assert [job.deadline for job in seen] == [Deadline(9.0)] * 3
    assert [job.answered for job in seen] == [2, 0, 2]
    assert llm.assembly.engine.busy is False


def _raiser(error: BaseException) -> Callable[..., None]:
    def watch(*_: object) -> None:
        raise error

    return watch
