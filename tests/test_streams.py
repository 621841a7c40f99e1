"""Several streams at once: each one's last output comes, whoever ran the step that ended it."""

from collections.abc import Callable, Iterator

import pytest

from models import greedy, open_llm, prompt_of
from retinue import LLM


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


def _raiser(error: BaseException) -> Callable[..., None]:
    def watch(*_: object) -> None:
        raise error

    return watch
