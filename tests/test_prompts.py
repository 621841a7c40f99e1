"""What `LLM.generate` takes as a prompt, and what it says of anything else."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from models import greedy, open_llm
from retinue import LLM
from retinue.errors import UsageError


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with open_llm("sample", context=64) as opened:
        yield opened


@pytest.mark.parametrize("prompts", [None, 5, [None], [["a"]], [1.5], [[1.5]], np.arange(3)])
def test_what_is_no_prompt_is_refused_with_a_hint(llm: LLM, prompts: Any) -> None:
    with pytest.raises(UsageError, match="not a prompt") as caught:
        llm.generate(prompts, greedy(1))
    assert "token ids" in caught.value.hint


def test_ids_may_be_numbers_of_numpy(llm: LLM) -> None:
    plain, other = llm.generate([[5, 6], list(np.array([5, 6]))], greedy(2), reuse=False)
    assert plain.token_ids == other.token_ids


def test_a_closed_model_says_so_with_a_hint() -> None:
    llm = open_llm("sample", context=64)
    stream = llm.stream([5], greedy(4))
    next(stream)
    llm.close()
    with pytest.raises(UsageError, match="closed") as caught:
        list(stream)
    assert caught.value.hint
