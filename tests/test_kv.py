"""The store of keys and values, and attention over it, against transformers' own cache."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

import models
import stores
from retinue.errors import ReadError
from retinue.model.attention import IMPLEMENTATION, install, uninstall
from retinue.model.kv import Segment, Sequence, Store
from retinue.types import BLOCK_TOKENS

PROMPT = models.prompt_of(40)
NEIGHBOURS, SCATTERED, BACKWARDS = [4, 5, 6, 7], [9, 2, 14, 3], [7, 6, 5, 4]
ODD = [7, 20, 1, 1, 11]


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return stores.build("olmoe")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The same weights; tests install stores of their own."""
    return stores.build("olmoe")


@pytest.fixture
def store(model: PreTrainedModel) -> Iterator[Store]:
    yield stores.stored(model)
    uninstall(model)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert ours.argmax(-1).tolist() == expected.argmax(-1).tolist()


def run(
    model: PreTrainedModel, store: Store, blocks: list[int], cuts: list[int] = ODD
) -> torch.Tensor:
    """The logits of PROMPT cut into pieces, over `blocks`."""
    memory, start, rows = Sequence(blocks), 0, []
    for count in cuts:
        rows += stores.forward(model, store, [(memory, PROMPT[start : start + count])])
        start += count
        assert memory.length == start
    return torch.cat(rows)


@torch.inference_mode()
def spoil(layer: Any, places: torch.Tensor | slice) -> None:
    """Whoever reads these places gets no number."""
    layer.keys[places] = torch.nan
    layer.values[places] = torch.nan


# --- one sequence


@pytest.mark.parametrize("cuts", [[40], [1] * 40, ODD], ids=["whole", "ones", "odd"])
@pytest.mark.parametrize("blocks", [NEIGHBOURS, SCATTERED], ids=["neighbours", "scattered"])
def test_logits_equal_those_of_the_dynamic_cache(
    plain: PreTrainedModel,
    model: PreTrainedModel,
    store: Store,
    cuts: list[int],
    blocks: list[int],
) -> None:
    reference, start, rows = stores.Plain(plain), 0, []
    for count in cuts:
        rows.append(reference(PROMPT[start : start + count]))
        start += count
    close(run(model, store, blocks, cuts), torch.cat(rows))


def test_keys_and_values_equal_those_of_the_dynamic_cache(
    plain: PreTrainedModel, model: PreTrainedModel, store: Store
) -> None:
    reference, memory = stores.Plain(plain), Sequence(SCATTERED)
    reference(PROMPT)
    stores.forward(model, store, [(memory, PROMPT)])
    places = memory.places[: memory.length]
    for mine, other in zip(store.layers, reference.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys[places].transpose(0, 1), other.keys[0])
        torch.testing.assert_close(mine.values[places].transpose(0, 1), other.values[0])


def test_the_placement_of_blocks_changes_no_bit(model: PreTrainedModel, store: Store) -> None:
    """Read in place or copied together, once it is known how attention reads."""
    run(model, store, NEIGHBOURS)
    assert all(layer.in_place for layer in store.layers)
    expected = run(model, store, NEIGHBOURS)
    for blocks in (SCATTERED, BACKWARDS, [0, 1, 2, 3], [12, 13, 14, 15]):
        assert torch.equal(run(model, store, blocks), expected)


def test_the_first_passes_of_a_store_change_no_bit(model: PreTrainedModel, store: Store) -> None:
    """They read copies, later ones read in place."""
    first = run(model, store, NEIGHBOURS)
    assert torch.equal(run(model, store, NEIGHBOURS), first)


def test_what_others_left_in_a_block_changes_no_bit(model: PreTrainedModel, store: Store) -> None:
    expected = run(model, store, NEIGHBOURS)
    for layer in store.layers:
        spoil(layer, slice(None))
    assert torch.equal(run(model, store, NEIGHBOURS), expected)
    assert torch.equal(run(model, store, SCATTERED), expected)


def test_a_prefix_of_another_sequence_serves_both(
    plain: PreTrainedModel, model: PreTrainedModel, store: Store
) -> None:
    """They own its blocks together, and what follows has blocks of their own."""
    first = Sequence([3, 8, 5])
    stores.forward(model, store, [(first, PROMPT)])
    shared = 2 * BLOCK_TOKENS
    second = Sequence([3, 8, 11], shared)
    other = models.prompt_of(10, seed=4)
    reference = stores.Plain(plain)
    reference(PROMPT[:shared])
    close(stores.forward(model, store, [(second, other)])[0], reference(other))
    reference = stores.Plain(plain)
    reference(PROMPT)
    close(stores.forward(model, store, [(first, other[:3])])[0], reference(other[:3]))


def test_a_sequence_grows_over_new_blocks(
    plain: PreTrainedModel, model: PreTrainedModel, store: Store
) -> None:
    memory, reference = Sequence([4, 5]), stores.Plain(plain)
    close(stores.forward(model, store, [(memory, PROMPT[:30])])[0], reference(PROMPT[:30]))
    assert memory.first == 4 * BLOCK_TOKENS
    memory.grow([4, 5, 9])
    assert (memory.first, memory.room, memory.length) == (None, 48, 30)
    close(stores.forward(model, store, [(memory, PROMPT[30:])])[0], reference(PROMPT[30:]))


def test_the_room_is_used_to_its_last_token_and_no_further(
    model: PreTrainedModel, store: Store
) -> None:
    memory = Sequence([4])
    stores.forward(model, store, [(memory, PROMPT[:BLOCK_TOKENS])])
    with pytest.raises(AssertionError, match="17, 16"):
        stores.forward(model, store, [(memory, [5])])
    assert memory.length == BLOCK_TOKENS
    assert store.segments == ()


def test_the_room_is_taken_once(model: PreTrainedModel, store: Store) -> None:
    run(model, store, NEIGHBOURS, [2, 1])
    places = [layer.keys.data_ptr() for layer in store.layers]
    run(model, store, SCATTERED)
    assert [layer.keys.data_ptr() for layer in store.layers] == places
    assert all(len(layer.keys) == store.tokens for layer in store.layers)


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_the_store_holds_whole_blocks(plain: PreTrainedModel, tokens: int) -> None:
    store = Store(plain.config, tokens)
    assert store.tokens == (16 if tokens < 17 else 32)


# --- many sequences


def test_sequences_of_one_pass_do_not_see_each_other(
    plain: PreTrainedModel, model: PreTrainedModel, store: Store
) -> None:
    """Prompts, pieces of prompts and single tokens beside each other, in any order."""
    memories = [Sequence(blocks) for blocks in ([0, 1, 4], SCATTERED, [10, 8], [15, 13, 12])]
    references = [stores.Plain(plain) for _ in memories]
    for counts in ([30, 0, 1, 9], [1, 17, 0, 9], [0, 1, 1, 1], [1, 1, 1, 1], [2, 20, 3, 4]):
        parts, expected = [], []
        for at, count in enumerate(counts):
            tokens = models.prompt_of(count, seed=10 * at + count)
            if tokens:
                parts.append((memories[at], tokens))
                expected.append(references[at](tokens))
        for ours, other in zip(stores.forward(model, store, parts), expected, strict=True):
            close(ours, other)


def test_without_commit_nothing_has_happened(model: PreTrainedModel, store: Store) -> None:
    expected = run(model, store, NEIGHBOURS, [27, 1, 1, 11])
    memory, rows = Sequence(NEIGHBOURS), []
    rows += stores.forward(model, store, [(memory, PROMPT[:27])])

    def fail(*_: Any) -> None:
        raise ReadError("in the middle")

    hook = model.model.layers[2].register_forward_hook(fail)
    for lost in ([9, 9, 9], [7]):
        with pytest.raises(ReadError):
            stores.forward(model, store, [(memory, lost)])
        assert (memory.length, store.segments) == (27, ())
    hook.remove()
    rows += stores.forward(model, store, [(memory, PROMPT[27:28])])
    rows += stores.forward(model, store, [(memory, PROMPT[28:29])])
    rows += stores.forward(model, store, [(memory, PROMPT[29:])])
    assert torch.equal(torch.cat(rows), expected)


# --- what a family does with keys


class Transformed:
    """A family that makes keys of what the cache returns, as those do that store them small."""

    def __init__(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called = 0
        plain = Cache.update

        def update(cache: Cache, keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> Any:
            keys, values = plain(cache, keys / 2, values, *rest)
            self.called += 1
            return keys * 2, values

        monkeypatch.setattr(Cache, "update", update)


def test_a_family_that_transforms_keys_is_never_read_in_place(
    plain: PreTrainedModel,
    model: PreTrainedModel,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = stores.Plain(plain)
    expected = torch.cat([reference(PROMPT[:27]), reference(PROMPT[27:])])
    family = Transformed(model, monkeypatch)
    for blocks in (NEIGHBOURS, SCATTERED):
        close(run(model, store, blocks, [27, 13]), expected)
    assert family.called
    assert not any(layer.in_place for layer in store.layers)
    # Beside another sequence too: each one's copies lie where its own keys are looked for.
    memories = [Sequence(NEIGHBOURS), Sequence(SCATTERED)]
    for part in (slice(0, 27), slice(27, 40)):
        parts = [(memory, PROMPT[part]) for memory in memories]
        for ours in stores.forward(model, store, parts):
            close(ours, expected[part])


# --- sliding windows


WINDOWS = {
    "mixtral": {"sliding_window": 8},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
}


@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows(family: str, attention: str) -> None:
    """Prompts longer than the window, at once, in pieces, and next to another sequence."""
    plain, model = (stores.build(family, **WINDOWS[family]) for _ in range(2))
    for each in (plain, model):
        each.set_attn_implementation(attention)
    store = stores.stored(model)
    windows = [layer.window for layer in store.layers]
    assert windows == [8] * 4 if family == "mixtral" else [None, None, 8, 8]
    assert store.is_sliding == [window is not None for window in windows]
    memories, references = [], []
    for blocks in (NEIGHBOURS, SCATTERED):
        memories.append(Sequence(blocks))
        references.append(stores.Plain(plain))
    for first, second in ([30, 5], [1, 1], [1, 12], [1, 1], [4, 9]):
        tokens = [models.prompt_of(first, seed=first), models.prompt_of(second, seed=9)]
        parts = list(zip(memories, tokens, strict=True))
        for ours, reference, ids in zip(
            stores.forward(model, store, parts), references, tokens, strict=True
        ):
            close(ours, reference(ids))
    assert all(layer.in_place for layer in store.layers)
    # What the window has left behind is not even read.
    for memory, reference in zip(memories, references, strict=True):
        for layer in store.layers:
            if layer.window is not None:
                spoil(layer, memory.places[: memory.length - layer.window + 1])
        close(stores.forward(model, store, [(memory, [5])])[0], reference([5]))


# --- install


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_was_installed_is_as_before(attention: str) -> None:
    """And while it is, a pass that is none of the engine's is as if it were not."""
    model = stores.build("qwen3_moe", use_sliding_window=True, sliding_window=8)
    model.set_attn_implementation(attention)
    names = {name for name, _ in model.named_modules()}
    ids = torch.tensor([PROMPT, models.prompt_of(40, seed=1)])
    padding = torch.ones_like(ids)
    padding[1, :9] = 0

    def answer() -> list[torch.Tensor]:
        with torch.inference_mode():
            masked = model(input_ids=ids, attention_mask=padding).logits
            return [model(input_ids=ids).logits, masked[0], masked[1, 9:]]

    expected = answer()
    store = Store(model.config, 64)
    install(model, store)
    assert model.config._attn_implementation == IMPLEMENTATION
    for ours, plain in zip(answer(), expected, strict=True):
        assert torch.equal(ours, plain)
    stores.forward(model, store, [(Sequence([0, 1, 2]), PROMPT)])
    uninstall(model)
    assert model.config._attn_implementation == attention
    assert not any("retinue_attend" in vars(module) for module in model.modules())
    assert {name for name, _ in model.named_modules()} == names
    for ours, plain in zip(answer(), expected, strict=True):
        assert torch.equal(ours, plain)


def test_two_models_have_each_their_store() -> None:
    """They share code and the registered function, not what they remember."""
    pair = [stores.build(family) for family in ("olmoe", "mixtral")]
    expected = [stores.Plain(each)(PROMPT) for each in pair]
    both = [stores.stored(each) for each in pair]
    both[1].begin([Segment(Sequence([1]), [5])])  # the other one's pass is under way
    close(stores.forward(pair[0], both[0], [(Sequence(SCATTERED), PROMPT)])[0], expected[0])
    both[1].end()
    close(stores.forward(pair[1], both[1], [(Sequence(SCATTERED), PROMPT)])[0], expected[1])
