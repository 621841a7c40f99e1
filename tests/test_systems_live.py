"""Every exact preset on the sample model gives the plain model's tokens, alone and together.

What the learnt ones go by is random here: a wrong forecast costs time, and never a token.
"""

from typing import Any

import pytest

import models
from retinue import LLM, SamplingParams
from retinue.engine import reserve
from retinue.policy.presets import PRESETS

EXACT = [name for name, row in PRESETS.items() if row.exact and not row.replayed]
TWO_TIERS = [name for name in EXACT if PRESETS[name].alone]
PROMPTS = [
    "The history of the lighthouse begins",
    "def fibonacci(n):",
    "Dear Sir or Madam, I am writing to",
    "1, 2, 3, 4, 5, 6,",
]
ANSWER = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    known = reserve.given_of
    monkeypatch.setattr(reserve, "given_of", lambda *a: models.learnt(known(*a), 256, 4096))


def answers(llm: LLM) -> list[list[int]]:
    """Those of all prompts, one after the other, then together."""
    found = [llm.generate(prompt, ANSWER, reuse=False, progress=False)[0] for prompt in PROMPTS]
    found += llm.generate(PROMPTS, ANSWER, reuse=False, progress=False)
    return [output.token_ids for output in found]


def wants_of(llm: LLM) -> list[int]:
    """How many wants each forecast has, from now on."""
    predictor: Any = llm.assembly.host.attendance.policies.predictor
    forecast, counts = predictor.forecast, []
    predictor.forecast = lambda view: (wants := forecast(view), counts.append(len(wants)))[0]
    return counts


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with open_llm("on-demand", "100%") as llm:
        return answers(llm)


def open_llm(preset: str, experts: str | int) -> Any:
    return models.open_llm("sample", preset=preset, experts=experts, chunk=32, context=64, batch=4)


@pytest.mark.parametrize("experts", ["25%", "2%"])
@pytest.mark.parametrize("preset", EXACT)
def test_the_plain_tokens(plain: list[list[int]], preset: str, experts: str) -> None:
    with open_llm(preset, experts) as llm:
        wanted = wants_of(llm)
        assert answers(llm) == plain
        looks = bool(llm.assembly.host.attendance.policies.predictor.depth)
        assert any(wanted) == looks or experts != "25%"  # where there is room
        llm.assembly.engine.idle()
        llm.assembly.cache.check()
        assert llm.assembly.metrics.total.decode.degraded_weight == 0
        assert llm.assembly.metrics.total.decode.misses > 0


@pytest.mark.parametrize("preset", TWO_TIERS)
def test_a_paper_s_second_place_is_said_to_be_missing(preset: str) -> None:
    with open_llm(preset, "25%") as llm:
        said = [note for note in llm.assembly.notes if "one place computes here" in note]
        assert len(said) == 1
        assert said[0].endswith(PRESETS[preset].alone)
