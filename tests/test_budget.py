"""How one number of bytes is split, and what is refused with the smallest that would work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disk import STEADY
from retinue.config import DEFAULT_CONTEXT
from retinue.errors import DoesNotFit, UsageError
from retinue.memory import budget
from retinue.memory.budget import CHUNK_TOKENS, RESERVE_BYTES, budget_bytes, split
from retinue.types import Facts

FACTS = Facts(
    name="tiny",
    family="olmoe",
    dtype="bf16",
    layers=4,
    moe_layers=4,
    experts_per_layer=16,
    total_experts=64,
    top_k=2,
    expert_bytes=3 << 20,
    slot_bytes=(3 << 20) + 4096,
    dense_bytes=100 << 20,
    dense_bytes_per_token=90 << 20,
    kv_bytes_per_token=4096,
    max_context=8192,
    vocab_size=1000,
    workspace_bytes=1 << 20,
    workspace_bytes_per_context=16,
    workspace_bytes_per_token=5000,
    workspace_bytes_per_pair=2,
    flops_per_token=10**9,
)


@contextmanager
def machine(*, free: int = 1 << 50, held: int = 0) -> Iterator[None]:
    """A machine with `free` bytes left, of which this process holds `held` more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "available_bytes", lambda: free)
        patch.setattr(budget, "resident_bytes", lambda: held)
        yield


def smallest(facts: Facts, context: int | None = None) -> int:
    """The smallest budget that the refusal names."""
    with machine(), pytest.raises(DoesNotFit) as caught:
        split(facts, memory=0, context=context)
    return caught.value.smallest_bytes


def parts(made: budget.Split) -> int:
    return made.fixed + made.kv + made.workspace + made.experts


some_facts = st.builds(
    lambda per_layer, layers, top_k, pages, dense, kv, context, work: replace(
        FACTS,
        layers=layers,
        moe_layers=layers,
        experts_per_layer=per_layer,
        total_experts=per_layer * layers,
        top_k=min(top_k, per_layer),
        slot_bytes=pages * 4096,
        dense_bytes=dense,
        kv_bytes_per_token=kv,
        max_context=context,
        workspace_bytes=work,
        workspace_bytes_per_pair=work % 7,
    ),
    per_layer=st.integers(1, 256),
    layers=st.integers(1, 60),
    top_k=st.integers(1, 16),
    pages=st.integers(1, 20_000),
    dense=st.integers(0, 1 << 36),
    kv=st.integers(0, 1 << 20),
    context=st.integers(1, 1 << 20),
    work=st.integers(0, 1 << 30),
)


@STEADY
@given(facts=some_facts, more=st.integers(0, 1 << 40), share=st.integers(0, 100))
def test_parts_never_exceed_the_budget(facts: Facts, more: int, share: int) -> None:
    with machine():
        least = smallest(facts)
        memory = least + more * share // 100
        made = split(facts, memory=memory)
    assert made.budget == memory
    assert parts(made) <= memory
    assert facts.min_slots <= made.slots <= facts.total_experts
    assert made.experts == made.slots * facts.slot_bytes
    # Nothing that fits is left out.
    assert made.slots == facts.total_experts or parts(made) + facts.slot_bytes > memory
    assert made.smallest == least
    assert 1 <= made.chunk <= min(made.context, CHUNK_TOKENS)
    assert made.context == min(facts.max_context, DEFAULT_CONTEXT)


@STEADY
@given(facts=some_facts, context=st.integers(1, 1 << 20))
def test_smallest_budget_works_and_one_byte_less_does_not(facts: Facts, context: int) -> None:
    tokens = min(context, facts.max_context)
    least = smallest(facts, tokens)
    with machine():
        made = split(facts, memory=least, context=tokens)
        assert made.slots == facts.min_slots
        assert parts(made) == least
        with pytest.raises(DoesNotFit) as caught:
            split(facts, memory=least - 1, context=tokens)
    assert caught.value.smallest_bytes == least
    assert "`tiny`" in str(caught.value)
    assert f"--memory {least}" in caught.value.hint


def test_every_part_is_counted() -> None:
    with machine():
        made = split(FACTS, memory=smallest(FACTS, 1000), context=1000)
    assert made.fixed == FACTS.dense_bytes + budget.RUNTIME_BYTES + RESERVE_BYTES
    assert made.kv == 1000 * 4096
    scattered = 1000 * 4096 // 4  # a layer's keys and values, copied together
    assert made.workspace == (1 << 20) + 16 * 1000 + scattered + 5000 * 1000 + 2 * 1000 * 1000
    assert made.experts == 2 * FACTS.slot_bytes


def test_room_for_many_sequences_and_long_chunks_is_counted() -> None:
    with machine():
        made = split(FACTS, memory="1GiB", context=1000)
        roomy = split(FACTS, memory="1GiB", context=1000, kv_tokens=5000)
        short = split(FACTS, memory="1GiB", context=1000, chunk=100)
    assert (made.kv_tokens, roomy.kv_tokens) == (1000, 5000)
    assert roomy.kv - made.kv == 4000 * 4096
    assert roomy.workspace - made.workspace == 4000 * 16 + 4000 * 4096 // 4
    assert (made.chunk, short.chunk) == (1000, 100)
    assert made.workspace - short.workspace == 900 * 5000 + 2 * 900 * 1000
    assert roomy.smallest - made.smallest == roomy.kv + roomy.workspace - made.kv - made.workspace


def test_all_sequences_together_have_room_for_the_longest_one() -> None:
    with machine():
        assert split(FACTS, memory="1GiB", context=1000, kv_tokens=1000).kv_tokens == 1000
        with pytest.raises(UsageError, match="kv_tokens is out of range: `999`") as caught:
            split(FACTS, memory="1GiB", context=1000, kv_tokens=999)
    assert "1000" in caught.value.hint


def test_longer_context_leaves_fewer_slots() -> None:
    with machine():
        memory = smallest(FACTS, 8192) + (10 << 20)
        slots = [split(FACTS, memory=memory, context=n).slots for n in (1, 1000, 4096, 8192)]
    assert slots == sorted(slots, reverse=True)
    assert slots[0] > slots[-1]


def test_context_beyond_the_model() -> None:
    with machine():
        assert split(FACTS, memory="1GiB", context=8192).context == 8192
        with pytest.raises(UsageError, match="context is out of range: `8193`") as caught:
            split(FACTS, memory="1GiB", context=8193)
    assert "8192" in caught.value.hint


@pytest.mark.parametrize(("context", "chunk"), [(1, 1), (2048, 2048), (2049, 2048), (8192, 2048)])
def test_chunk_depends_on_the_context_alone(context: int, chunk: int) -> None:
    with machine():
        for memory in ("2GiB", "20GiB"):
            assert split(FACTS, memory=memory, context=context).chunk == chunk


@pytest.mark.parametrize(
    ("experts", "slots"),
    [
        (None, 64),
        ("100%", 64),
        ("150%", 64),
        ("50%", 32),
        ("4%", 2),
        (5 * FACTS.slot_bytes, 5),
        (6 * FACTS.slot_bytes - 1, 5),
        ("1TiB", 64),
    ],
)
def test_limit_for_experts(experts: str | int | None, slots: int) -> None:
    with machine():
        made = split(FACTS, memory="4GiB", experts=experts)
        assert made.slots == slots
        # The limit takes away, it never adds.
        least = smallest(FACTS)
        assert split(FACTS, memory=least, experts=experts).slots == 2


@pytest.mark.parametrize("experts", ["3%", 2 * FACTS.slot_bytes - 1, "1MiB", 0])
def test_limit_for_experts_that_is_too_small(experts: str | int) -> None:
    with machine(), pytest.raises(DoesNotFit, match=f"`--experts {experts}`") as caught:
        split(FACTS, memory="4GiB", experts=experts)
    assert caught.value.smallest_bytes == 2 * FACTS.slot_bytes
    assert f"--experts {2 * FACTS.slot_bytes}" in caught.value.hint
    with machine():
        assert split(FACTS, memory="4GiB", experts=caught.value.smallest_bytes).slots == 2


@pytest.mark.parametrize("name", ["memory", "experts"])
def test_what_is_no_size(name: str) -> None:
    with machine(), pytest.raises(UsageError, match="not a size: `much`"):
        split(FACTS, **{"memory": "1GiB", name: "much"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("50%", 5 << 30),
        ("100%", 10 << 30),
        ("3GiB", 3 << 30),
        ("10GiB", 10 << 30),
        ("400GiB", (10 << 30) + RESERVE_BYTES),
        ("400%", (10 << 30) + RESERVE_BYTES),
    ],
)
def test_budget_is_bounded_by_the_machine(memory: str, expected: int) -> None:
    with machine(free=9 << 30, held=1 << 30):
        assert budget_bytes(memory) == expected


def test_budget_beyond_the_machine_does_not_make_a_model_fit() -> None:
    with machine(free=100 << 20, held=50 << 20), pytest.raises(DoesNotFit):
        split(FACTS, memory="100GiB")
