"""Tokens from logits: greedy, seeded sampling and its filters, logprobs."""

import math
from collections import Counter

import pytest
import torch

from retinue.errors import UsageError
from retinue.model.sampler import Sampler
from retinue.types import SamplingParams

# Probabilities 0.5, 0.25, 0.15, 0.07, 0.03 in an order that is not theirs.
SHARES = torch.tensor([0.07, 0.5, 0.15, 0.03, 0.25])
LOGITS = SHARES.log() + 3.0


def draws(count: int = 4000, logits: torch.Tensor = LOGITS, **fields: object) -> Counter[int]:
    params = SamplingParams(**({"temperature": 1.0, "seed": 7} | fields))
    sampler = Sampler(params)
    return Counter(sampler.choose(logits) for _ in range(count))


def assert_distributed(counts: Counter[int], shares: dict[int, float]) -> None:
    """Chi-square against `shares`; the seed is fixed, so this never fails by chance."""
    total = counts.total()
    assert set(counts) == set(shares)
    statistic = sum((counts[i] - total * p) ** 2 / (total * p) for i, p in shares.items())
    assert statistic < 18.5  # the 0.999 quantile for four degrees of freedom


def test_greedy_takes_the_largest() -> None:
    assert draws(5, temperature=0.0) == {1: 5}


def test_greedy_takes_the_first_of_equals() -> None:
    assert draws(5, torch.tensor([0.0, 2.0, 2.0]), temperature=0.0) == {1: 5}


def test_temperature_one_samples_the_model() -> None:
    assert_distributed(draws(), dict(enumerate(SHARES.tolist())))


def test_temperature_flattens_and_sharpens() -> None:
    for temperature in (0.5, 2.0):
        shares = (SHARES ** (1 / temperature)) / (SHARES ** (1 / temperature)).sum()
        assert_distributed(draws(temperature=temperature), dict(enumerate(shares.tolist())))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-45, 1e-300])
def test_tiny_temperatures_are_nearly_greedy(temperature: float) -> None:
    assert draws(20, temperature=temperature) == {1: 20}


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.zeros(4096, dtype=torch.bfloat16)
    assert len(draws(2000, logits)) > 1000


def test_top_k_keeps_k() -> None:
    assert_distributed(draws(top_k=2), {1: 2 / 3, 4: 1 / 3})
    assert draws(50, top_k=1) == {1: 50}
    assert_distributed(draws(top_k=99), dict(enumerate(SHARES.tolist())))


def test_top_p_keeps_the_fewest_that_reach_the_share() -> None:
    assert_distributed(draws(top_p=0.7), {1: 2 / 3, 4: 1 / 3})
    assert_distributed(draws(top_p=0.8), {1: 0.5 / 0.9, 4: 0.25 / 0.9, 2: 0.15 / 0.9})
    assert draws(50, top_p=0.001) == {1: 50}


def test_top_p_counts_the_share_of_what_top_k_left() -> None:
    """Of 0.5 and 0.25 the first alone is two thirds."""
    assert draws(50, top_k=2, top_p=0.6) == {1: 50}
    assert set(draws(200, top_k=3, top_p=0.6)) == {1, 4}


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert_distributed(draws(min_p=0.4), {1: 2 / 3, 4: 1 / 3})
    assert draws(50, min_p=1.0) == {1: 50}


def test_repetition_penalty_divides_what_is_likely_and_multiplies_what_is_not() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    assert sampler.choose(torch.tensor([3.0, 2.0]), [0]) == 1
    assert sampler.choose(torch.tensor([3.0, 2.0]), [], [0]) == 1
    assert sampler.choose(torch.tensor([-1.0, -1.5]), [0, 0]) == 1
    assert sampler.choose(torch.tensor([3.0, 1.4]), [0]) == 0
    assert sampler.choose(torch.tensor([3.0, 2.0]), [], []) == 0


def test_repetition_penalty_leaves_the_logits_as_they_are() -> None:
    logits = torch.tensor([3.0, 2.0])
    Sampler(SamplingParams(repetition_penalty=2.0)).choose(logits, [0, 1])
    assert logits.tolist() == [3.0, 2.0]


def test_seeds_reproduce_and_differ() -> None:
    def answer(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.choose(torch.zeros(1000)) for _ in range(10)]

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)
    assert answer(None) != answer(None)


def test_a_sampler_does_not_touch_the_global_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws(10)
    assert torch.equal(torch.rand(3), expected)


def test_logprobs_are_those_of_the_model() -> None:
    """Whatever the temperature and the filters are."""
    sampler = Sampler(SamplingParams(temperature=0.5, top_k=1, logprobs=2))
    found = sampler.logprob(LOGITS, 0)
    assert found is not None
    assert found.token_id == 0
    assert found.logprob == pytest.approx(math.log(0.07), abs=1e-5)
    assert [token for token, _ in found.top] == [1, 4]
    assert [value for _, value in found.top] == pytest.approx(
        [math.log(0.5), math.log(0.25)], abs=1e-5
    )


def test_how_many_logprobs() -> None:
    assert Sampler(SamplingParams()).logprob(LOGITS, 0) is None
    none = Sampler(SamplingParams(logprobs=0)).logprob(LOGITS, 1)
    assert none is not None
    assert none.top == ()
    every = Sampler(SamplingParams(logprobs=100)).logprob(LOGITS, 1)
    assert every is not None
    assert sum(math.exp(value) for _, value in every.top) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("max_new_tokens", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("stop", ["a", ""]),
        ("logprobs", 101),
        ("logprobs", -1),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.hint


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


@pytest.mark.parametrize("name", ["temperature", "repetition_penalty", "top_p", "min_p"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_what_is_no_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is out of range") as caught:
        SamplingParams(**{name: value})
    assert name in caught.value.hint


# --- what changes logits before a token is chosen


def changed(logits: list[float], answer: list[int], **fields: object) -> list[float]:
    """The obvious reference of OpenAI's penalties and biases, token by token."""
    params = SamplingParams(**fields)
    out = []
    for token, value in enumerate(logits):
        count = answer.count(token)
        value -= count * params.frequency_penalty
        value -= (count > 0) * params.presence_penalty
        out.append(value + params.logit_bias.get(token, 0.0))
    return out


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 0.75},
        {"frequency_penalty": -0.5},
        {"logit_bias": {3: 100.0}},
        {"logit_bias": {0: -100.0, 2: 1.25}},
        {"presence_penalty": 0.5, "frequency_penalty": 1.0, "logit_bias": {1: -3.0}},
    ],
)
@pytest.mark.parametrize("answer", [[], [0], [1, 1, 2], [4, 4, 4, 0]])
def test_penalties_and_biases_are_as_written(fields: dict[str, object], answer: list[int]) -> None:
    logits = [2.0, 1.75, 1.0, 0.5, 2.25]
    expected = changed(logits, answer, **fields)
    chosen = Sampler(SamplingParams(**fields)).choose(torch.tensor(logits), [2, 3], answer)
    assert expected[chosen] == max(expected)
    # What is sampled follows the same logits.
    params = SamplingParams(temperature=1.0, seed=3, **fields)
    sampler = Sampler(params)
    drawn = Counter(sampler.choose(torch.tensor(logits), [2, 3], answer) for _ in range(2000))
    shares = torch.softmax(torch.tensor(expected), 0).tolist()
    assert all(abs(drawn[i] / 2000 - share) < 0.05 for i, share in enumerate(shares))


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {0: 101.0}},
    ],
)
def test_penalties_out_of_range(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        SamplingParams(**fields)
