"""The Python interface's order and deadlines: of all requests, and of one call."""

from pathlib import Path

import pytest

import models
from retinue import LLM, Deadline, Overloaded, UsageError
from retinue.policy.order.emoe import Emoe
from retinue.policy.order.shortest import Shortest

PROMPT = models.prompt_of(20)


def learn_costs(llm: LLM) -> None:
    """Let the order see what passes cost here; one prompt at a time is never refused."""
    for _ in range(12):  # the estimate wants eight passes of each kind, of which older count less
        llm.generate(PROMPT, models.greedy(4))


def test_the_order_is_the_one_that_was_named(olmoe: Path) -> None:
    with models.open_llm(olmoe) as llm:
        assert isinstance(llm.assembly.engine.scheduler.order, Emoe)
    with models.open_llm(olmoe, order="shortest") as llm:
        assert isinstance(llm.assembly.engine.scheduler.order, Shortest)
    with pytest.raises(UsageError, match="unknown order: `longest`"):
        models.open_llm(olmoe, order="longest")


@pytest.mark.parametrize("setting", ["first_token_deadline", "token_deadline"])
def test_deadlines_are_seconds_above_zero(olmoe: Path, setting: str) -> None:
    with pytest.raises(UsageError, match=r"out of range: `0\.0`"):
        models.open_llm(olmoe, **{setting: 0.0})


def test_what_is_promised_to_all_may_be_promised_otherwise_to_one(olmoe: Path) -> None:
    """A microsecond is too little for all but the one that may try, as nothing runs yet."""
    many, late = [PROMPT] * 4, {"first_token_deadline": 1e-6}
    with models.open_llm(olmoe, batch=1, **late) as llm:
        learn_costs(llm)
        with pytest.raises(Overloaded) as caught:
            llm.generate(many, models.greedy(2))
        assert caught.value.retry_after_s > 0
        answers = llm.generate(many, models.greedy(2), deadline=Deadline(first_token_s=600))
        assert [len(answer.token_ids) for answer in answers] == [2] * 4
        llm.assembly.engine.idle()
    with models.open_llm(olmoe, batch=1, order="fcfs", **late) as llm:
        learn_costs(llm)
        assert len(llm.generate(many, models.greedy(2))) == 4  # who comes first is never refused


def test_a_stream_has_a_deadline_of_its_own() -> None:
    with models.open_llm("sample", batch=1) as llm:
        learn_costs(llm)
        running = llm.stream("A: Hello", models.greedy(30))
        next(running)
        with pytest.raises(Overloaded):
            list(llm.stream(PROMPT, models.greedy(2), deadline=Deadline(first_token_s=1e-6)))
        assert [*running][-1].finish_reason == "length"
