"""Layers with running states: many sequences in one pass against transformers' cache for each.

Rows of a pass advance states together. Tiny models of transformers with their plain experts.
"""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin as LinearAttention

import models
import stores
from retinue.errors import ReadError
from retinue.model.attention import uninstall
from retinue.model.kv import Pool, Segment, Sequence, Store

BLOCKS = ([0, 1, 2], [9, 5, 14], [15, 13, 11])
LENGTHS = (19, 3, 33)
PROMPTS = [models.prompt_of(length, seed=length) for length in LENGTHS]
FED = models.prompt_of(12, seed=5)


@pytest.fixture(scope="module", params=stores.HYBRIDS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(family: str) -> PreTrainedModel:
    return stores.build(family)


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    return stores.build(family)


@pytest.fixture
def store(model: PreTrainedModel) -> Any:
    yield stores.stored(model)
    uninstall(model)


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4)


def prefilled(model: PreTrainedModel, store: Store) -> list[Sequence]:
    """Each prompt in a pass of its own."""
    memories = [Sequence(list(blocks)) for blocks in BLOCKS]
    for memory, prompt in zip(memories, PROMPTS, strict=True):
        stores.forward(model, store, [(memory, prompt)])
    return memories


def references(plain: PreTrainedModel) -> list[stores.Plain]:
    found = [stores.Plain(plain) for _ in PROMPTS]
    for each, prompt in zip(found, PROMPTS, strict=True):
        each(prompt)
    return found


def states(memory: Sequence) -> list[torch.Tensor]:
    """Copies of all that it remembers besides keys and values."""
    tensors = [tensor for layer in memory.states.values() for tensor in layer]
    return [tensor.clone() for tensor in tensors if tensor is not None]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def test_the_kinds_of_layers(family: str, store: Store) -> None:
    """Attention and states in different layers, or both in one."""
    assert store.shareable
    assert not store.packable
    pools = [isinstance(layer, Pool) for layer in store.layers]
    running = [isinstance(layer, LinearAttention) for layer in store.layers]
    assert any(pools)
    assert any(running)
    assert all(map(any, zip(pools, running, strict=True)))
    assert any(map(all, zip(pools, running, strict=True))) is (family == "falcon_h1")


@pytest.mark.parametrize("cuts", [[33], [16, 16, 1], [5, 1, 1, 26]], ids=str)
def test_prompts_in_pieces(
    plain: PreTrainedModel, model: PreTrainedModel, store: Store, cuts: list[int]
) -> None:
    memory, reference, start = Sequence([9, 5, 14]), stores.Plain(plain), 0
    expected = reference(PROMPTS[2])
    for count in cuts:
        piece = PROMPTS[2][start : start + count]
        (ours,) = stores.forward(model, store, [(memory, piece)])
        close(ours, expected[start : start + count])
        start += count
    assert memory.length == len(PROMPTS[2])


def test_rows_that_decode_together(
    plain: PreTrainedModel, model: PreTrainedModel, store: Store
) -> None:
    """In any order, all or some, one alone: each as if the others were not."""
    memories, expected = prefilled(model, store), references(plain)
    for step, order in enumerate(([0, 1, 2], [2, 0], [1], [1, 2, 0], [0], [2, 1])):
        parts = [(memories[at], [FED[step + at]]) for at in order]
        for at, ours in zip(order, stores.forward(model, store, parts), strict=True):
            close(ours, expected[at]([FED[step + at]]))
    for memory, reference in zip(memories, expected, strict=True):
        assert memory.length == reference.cache.get_seq_length()


def test_a_sequence_may_go_on_by_a_piece(
    plain: PreTrainedModel, model: PreTrainedModel, store: Store
) -> None:
    """As the second turn of a conversation does, while others decode."""
    memories, expected = prefilled(model, store), references(plain)
    stores.forward(model, store, [(memory, [7]) for memory in memories])
    for reference in expected:
        reference([7])
    close(stores.forward(model, store, [(memories[1], FED)])[0], expected[1](FED))
    parts = [(memory, [9]) for memory in memories]
    for ours, reference in zip(stores.forward(model, store, parts), expected, strict=True):
        close(ours, reference([9]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_pass_that_fails_has_not_happened(
    model: PreTrainedModel, store: Store, count: int
) -> None:
    """Lengths and states are as before, bit for bit, and so is what follows."""
    memories = prefilled(model, store)
    parts = [(memory, [9]) for memory in memories[:count]]
    before = [states(memory) for memory in memories]
    lengths = [memory.length for memory in memories]

    def fail(*_: Any) -> None:
        raise ReadError("in the middle")

    hook = model.get_submodule("model.layers")[-1].register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(ReadError):
            stores.forward(model, store, parts)
    hook.remove()
    assert [memory.length for memory in memories] == lengths
    for memory, kept in zip(memories, before, strict=True):
        assert equal(states(memory), kept)
    after = stores.forward(model, store, parts)
    again = prefilled(model, store)
    unbroken = stores.forward(model, store, [(memory, [9]) for memory in again[:count]])
    for ours, other in zip(after, unbroken, strict=True):
        assert torch.equal(ours, other)


def test_a_first_pass_that_fails_leaves_nothing(model: PreTrainedModel, store: Store) -> None:
    memory = Sequence([3, 4, 5])
    store.begin([Segment(memory, PROMPTS[0])])
    store.end()
    assert (memory.length, memory.states) == (0, {})
    (ours,) = stores.forward(model, store, [(memory, PROMPTS[0])])
    (other,) = stores.forward(model, store, [(Sequence([3, 4, 5]), PROMPTS[0])])
    assert torch.equal(ours, other)


def test_sequences_own_their_states(model: PreTrainedModel, store: Store) -> None:
    """A pass for some changes nothing of the others, nor of what was kept elsewhere."""
    memories = prefilled(model, store)
    kept = [states(memory) for memory in memories]
    held = list(memories[0].states[next(iter(memories[0].states))])
    stores.forward(model, store, [(memories[0], [9]), (memories[1], [8])])
    assert not equal(states(memories[0]), kept[0])
    assert not equal(states(memories[1]), kept[1])
    assert equal(states(memories[2]), kept[2])
    first = [tensor for tensor in held if tensor is not None]
    assert equal(first, kept[0][: len(first)])


def test_new_and_old_sequences_do_not_share_a_pass(model: PreTrainedModel, store: Store) -> None:
    memories = prefilled(model, store)
    with pytest.raises(AssertionError, match="new sequences and old ones"):
        store.begin([Segment(memories[0], [5]), Segment(Sequence([7]), [5])])
