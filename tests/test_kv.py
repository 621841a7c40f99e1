"""The sequence's own cache against transformers' DynamicCache."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import models
from retinue.errors import UsageError
from retinue.model.kv import SequenceCache

PROMPT = models.prompt_of(40)


@pytest.fixture(scope="module")
def model(olmoe: Path) -> PreTrainedModel:
    return models.stock(olmoe)


@torch.inference_mode()
def logits(model: PreTrainedModel, cache: Cache, tokens: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens]), past_key_values=cache).logits[0]


@pytest.mark.parametrize("cuts", [[40], [1] * 40, [7, 20, 1, 1, 11]], ids=["whole", "ones", "odd"])
def test_outputs_equal_those_of_the_dynamic_cache(model: PreTrainedModel, cuts: list[int]) -> None:
    ours, plain, start = SequenceCache(models.LAYERS, 64), DynamicCache(config=model.config), 0
    for count in cuts:
        tokens = PROMPT[start : start + count]
        assert torch.equal(logits(model, ours, tokens), logits(model, plain, tokens))
        start += count
        assert ours.length == ours.get_seq_length() == plain.get_seq_length() == start


def test_keys_and_values_equal_those_of_the_dynamic_cache(model: PreTrainedModel) -> None:
    ours, plain = SequenceCache(models.LAYERS, 64), DynamicCache(config=model.config)
    for cache in (ours, plain):
        logits(model, cache, PROMPT)
    for mine, other in zip(ours.layers, plain.layers, strict=True):
        assert torch.equal(mine.keys[:, :, : len(PROMPT)], other.keys)
        assert torch.equal(mine.values[:, :, : len(PROMPT)], other.values)


def test_truncate_forgets_what_comes_after(model: PreTrainedModel) -> None:
    cache, fresh = SequenceCache(models.LAYERS, 64), SequenceCache(models.LAYERS, 64)
    logits(model, cache, PROMPT[:10])
    logits(model, cache, models.prompt_of(20, seed=8))
    cache.truncate(10)
    assert cache.length == 10
    logits(model, fresh, PROMPT[:10])
    assert torch.equal(logits(model, cache, PROMPT[10:]), logits(model, fresh, PROMPT[10:]))


def test_truncate_never_grows(model: PreTrainedModel) -> None:
    cache = SequenceCache(models.LAYERS, 64)
    cache.truncate(5)
    assert cache.length == 0
    logits(model, cache, PROMPT[:3])
    cache.truncate(9)
    assert cache.length == 3
    cache.truncate(0)
    assert cache.length == 0


def test_the_room_is_used_to_its_last_token(model: PreTrainedModel) -> None:
    cache = SequenceCache(models.LAYERS, len(PROMPT))
    plain = DynamicCache(config=model.config)
    assert torch.equal(logits(model, cache, PROMPT), logits(model, plain, PROMPT))


def test_more_than_the_room_is_refused(model: PreTrainedModel) -> None:
    cache = SequenceCache(models.LAYERS, 8)
    logits(model, cache, PROMPT[:8])
    with pytest.raises(UsageError, match="context of 8 tokens"):
        logits(model, cache, PROMPT[8:9])
    assert cache.length == 8


def test_the_room_is_taken_once(model: PreTrainedModel) -> None:
    cache = SequenceCache(models.LAYERS, 64)
    logits(model, cache, PROMPT[:2])
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for token in PROMPT[2:]:
        logits(model, cache, [token])
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
