"""Slots that come and go: what others do not use of a budget, experts have meanwhile."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import models
from retinue.memory import lending
from retinue.memory.base import Sizes
from retinue.memory.budget import RESERVE_BYTES, split, workspace_bytes
from retinue.memory.cache import ExpertCache
from retinue.memory.instant import InstantLink
from retinue.memory.lending import EVERY, SPARE_BYTES, Lending
from retinue.memory.tier import Tier
from retinue.policy.evict.recency import Recency
from retinue.types import Expert, Facts
from test_budget import FACTS, machine, smallest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is lent elsewhere")

SLOT = 64 << 10
MODEL = replace(FACTS, slot_bytes=SLOT)
PROMISED = 13


class Lent:
    """Room for a fifth of the experts, in a process that holds `beyond` bytes besides them."""

    def __init__(self, model: Facts = MODEL) -> None:
        budget = smallest(model) + (PROMISED - model.min_slots) * SLOT
        with machine():
            self.split = split(model, memory=budget)
        assert self.split.slots == PROMISED
        self.beyond = 0
        self.tier = Tier(PROMISED, SLOT, self.split.more)
        self.tier.touch()
        self.tier.finish()
        read = np.full((1, MODEL.layers, MODEL.experts_per_layer), SLOT)
        link = InstantLink(Sizes(read, read))
        self.cache = ExpertCache(Sizes(read, read), self.tier, link, Recency(), MODEL.top_k)
        self.lending = Lending(model, self.split, self.tier, self.cache, self.resident)

    def resident(self) -> int:
        return self.beyond + (self.tier.slots - self.tier.untouched) * SLOT

    def leave(self, count: int) -> None:
        """Let the process hold so much that there is room for `count` slots beyond the promised."""
        needed = workspace_bytes(MODEL, 1, 100, 100) - MODEL.workspace_bytes
        needed += EVERY * MODEL.kv_bytes_per_token + SPARE_BYTES + RESERVE_BYTES
        self.beyond = self.split.budget - needed - (PROMISED + count) * SLOT

    def decode(self, passes: int) -> None:
        for _ in range(passes):
            self.cache.begin_step("decode")
            self.lending.begin_pass("decode", 1, [100])
        self.tier.finish()

    def fill(self) -> list[Expert]:
        """Experts in all slots, each used later than the one before; returns them."""
        experts = [Expert(at // 16, at % 16) for at in range(self.tier.slots)]
        self.cache.read(experts)
        self.cache.poll()
        for layer, index in experts:
            self.cache.begin_step("decode")
            self.cache.mark_used(layer, np.array([index]))
        return experts

    def unused(self, tokens: int, context: int) -> int:
        """Bytes that a prompt's pass leaves."""
        needed = workspace_bytes(MODEL, tokens, context, context)
        needed += MODEL.kv_bytes_per_token * tokens
        return self.split.budget - RESERVE_BYTES - self.resident() - needed


def test_what_nobody_uses_becomes_slots_after_some_passes() -> None:
    lent = Lent()
    lent.leave(7)
    lent.decode(EVERY - 1)
    assert lent.tier.slots == PROMISED
    lent.decode(1)
    assert lent.tier.slots == PROMISED + 7 == lent.cache.spare
    lent.decode(4 * EVERY)
    assert lent.tier.slots == PROMISED + 7, "and no more, as nothing else became free"
    lent.leave(100)
    lent.decode(EVERY)
    assert lent.tier.slots == MODEL.total_experts, "more than all is of no use"
    assert len(lent.fill()) == MODEL.total_experts
    lent.cache.check()


def test_slots_are_added_once_those_before_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lent = Lent()
    lent.leave(3)
    for name in ("touch", "finish"):
        monkeypatch.setattr(lent.tier, name, lambda: None)
    lent.decode(EVERY)
    assert lent.tier.untouched == 3
    lent.leave(9)
    lent.decode(EVERY)
    assert lent.tier.slots == PROMISED + 3


def test_a_prompt_takes_back_what_it_may_need_and_the_oldest_leave() -> None:
    lent = Lent()
    lent.leave(30)
    lent.decode(EVERY)
    experts, slots = lent.fill(), lent.tier.slots
    tokens, context = 100, 200
    lent.beyond += lent.unused(tokens, context) + 5 * SLOT - 9  # five slots and a bit too little
    lent.beyond += SLOT
    lent.lending.begin_pass("prefill", tokens, [context])
    gone = slots - lent.tier.slots
    assert gone == 6
    assert 0 <= lent.unused(tokens, context) < SLOT
    there = [lent.cache.rows[layer][index] >= 0 for layer, index in experts]
    assert there == [False] * gone + [True] * lent.tier.slots
    lent.cache.check()


def test_what_was_promised_is_never_taken() -> None:
    lent = Lent()
    lent.leave(20)
    lent.decode(EVERY)
    lent.fill()
    lent.beyond = 2 * lent.split.budget
    lent.lending.begin_pass("prefill", 1, [1])
    assert lent.tier.slots == PROMISED == lent.cache.resident
    lent.decode(2 * EVERY)
    assert lent.tier.slots == PROMISED
    lent.cache.check()


def test_sequences_with_running_states_need_room_for_those() -> None:
    """Of each sequence of a pass: its own, and the copy that the pass works on."""
    lent = Lent(replace(MODEL, state_bytes=3 * SLOT))
    lent.leave(20)
    lent.decode(EVERY)
    assert lent.tier.slots == PROMISED + 20 - 6
    lent.beyond += lent.unused(8, 8)
    lent.lending.begin_pass("prefill", 8, [8])
    assert lent.tier.slots == PROMISED + 14 - 6
    lent.beyond += lent.unused(8, 8) - 2 * SLOT
    lent.lending.begin_pass("prefill", 8, [4, 4])
    assert lent.tier.slots == PROMISED


def test_decoding_gives_back_what_the_process_took() -> None:
    lent = Lent()
    lent.leave(20)
    lent.decode(EVERY)
    lent.beyond += SPARE_BYTES + 4 * SLOT
    lent.decode(EVERY)
    assert lent.tier.slots == PROMISED + 16


def test_keys_in_huge_pages_may_come_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "_huge_pages_everywhere", lambda: True)
    lent = Lent()
    lent.leave(20)
    lent.decode(EVERY)
    whole = lent.split.kv - EVERY * MODEL.kv_bytes_per_token
    assert whole > 20 * SLOT
    assert lent.tier.slots == PROMISED
    lent.beyond -= whole
    lent.decode(EVERY)
    assert lent.tier.slots == PROMISED + 20


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_the_promises_hold(seed: int) -> None:
    source, lent = random.Random(seed), Lent()
    most = PROMISED + lent.split.more
    for _ in range(300):
        lent.beyond = max(0, lent.beyond + source.randrange(-40, 40) * SLOT)
        if source.random() < 0.2:
            lent.leave(source.randrange(60))
        before = lent.tier.slots
        if source.random() < 0.3:
            tokens = source.randrange(1, 512)
            context = tokens + source.randrange(1000)
            lent.cache.begin_step("prefill")
            lent.lending.begin_pass("prefill", tokens, [context])
            assert lent.tier.slots <= before
            assert lent.tier.slots == PROMISED or lent.unused(tokens, context) >= 0
        else:
            lent.decode(source.randrange(1, 2 * EVERY))
        lent.fill()
        lent.cache.check()
        assert PROMISED <= lent.tier.slots <= most
    lent.tier.release()


def test_slots_that_are_given_up_hold_no_memory() -> None:
    tier = Tier(2, SLOT, 3)
    assert (tier.slots, tier.more, tier.free) == (2, 3, 2)
    tier.grow(3)
    tier.finish()
    assert (tier.slots, tier.more, tier.free, tier.untouched) == (5, 0, 5, 0)
    slots = [tier.take() for _ in range(5)]
    assert sorted(slot for slot in slots if slot is not None) == [0, 1, 2, 3, 4]
    for slot in range(5):
        tier.memory(slot)[:] = b"x" * SLOT
    for slot in (0, 3, 4):
        tier.give(slot)
    assert tier.shrink(9) == 3, "two are held"
    assert (tier.slots, tier.more, tier.free) == (2, 3, 0)
    assert [bytes(tier.memory(slot)[:1]) for slot in range(5)] == [b"\0", b"x", b"x", b"\0", b"\0"]
    tier.grow(3)
    tier.finish()
    again = [tier.take() for _ in range(4)]
    assert sorted(slot for slot in again if slot is not None) == [0, 3, 4]
    tier.release()


def test_untouched_slots_are_given_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Tier(2, SLOT, 3)
    tier.touch()
    tier.finish()
    monkeypatch.setattr(tier, "touch", lambda: None)
    tier.grow(3)
    assert tier.untouched == 3
    assert tier.shrink(3) == 3
    assert (tier.untouched, tier.free, tier.slots) == (0, 2, 2)


@pytest.mark.parametrize(
    "settings", [{"experts": "25%"}, {"preset": "popular", "memory": "620MiB", "context": 256}]
)
def test_who_names_the_experts_or_keeps_a_set_is_lent_nothing(settings: dict[str, str]) -> None:
    with models.open_llm("sample", **settings) as llm:
        assert llm.assembly.tier.more == 0


LIVE = """
import sys
from retinue import LLM, SamplingParams
from retinue.memory.machine import resident_bytes

greedy = SamplingParams(max_new_tokens=100, ignore_eos=True)
with LLM("sample", memory="{memory}", context=2048) as llm:
    tier, promised, budget = llm.assembly.tier, llm.assembly.split.slots, llm.assembly.split.budget
    assert promised < 200, promised
    first = llm.generate("SELECT a FROM", greedy)[0]
    lent = tier.slots - promised
    again = llm.generate(list(range(5, 1805)), SamplingParams(max_new_tokens=40, ignore_eos=True))
    third = llm.generate("SELECT a FROM", greedy)[0]
    assert first.token_ids == third.token_ids
    assert lent > 20, lent
    assert resident_bytes(peak=True) <= budget, (resident_bytes(peak=True), budget)
print(first.token_ids, again[0].token_ids)
"""


def test_a_small_budget_is_used_and_kept_and_tokens_stay_the_same() -> None:
    """In a process of its own, as this one holds far more than the budget."""

    def run(memory: str) -> str:
        command = [sys.executable, "-c", LIVE.format(memory=memory)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("620MiB") == run("628MiB")
