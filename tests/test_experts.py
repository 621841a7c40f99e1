"""The experts function against the slow, obvious path, and its sums, skips and waits."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

import models
from retinue import LLM
from retinue.errors import Cancelled
from retinue.memory.base import Urgency
from retinue.memory.files import Reader
from retinue.model.reference import TOLERANCE, reference_experts
from retinue.model.work import apply_expert, weighted_sum
from retinue.types import Demand, Want

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def typed(request: pytest.FixtureRequest, checkpoints: Path) -> Iterator[LLM]:
    """A model with a third of its experts, in each type."""
    folder = models.make(checkpoints / f"experts-{request.param}", "qwen3_moe", request.param)
    with models.open_llm(folder, experts="34%") as llm:
        yield llm


def work(llm: LLM, tokens: int, k: int, seed: int) -> list[torch.Tensor]:
    """Random hidden states, distinct experts per token, and weights."""
    random = torch.Generator().manual_seed(seed)
    dtype = llm.assembly.network.model.dtype
    hidden = torch.randn(tokens, 64, generator=random).to(dtype)
    index = torch.rand(tokens, models.EXPERTS, generator=random).topk(k).indices
    weights = torch.rand(tokens, k, generator=random).to(dtype)
    return [hidden, index, weights]


def both(llm: LLM, layer: int, case: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    experts = llm.assembly.network.experts
    module = next(found.module for found in experts.modules if found.layer == layer)
    host = llm.assembly.engine._runner.host
    with torch.inference_mode():
        llm.assembly.cache.begin_step("prefill" if len(case[0]) > 1 else "decode")
        fast = host.run(layer, *case)
        slow = reference_experts(module, experts.layouts[layer], *case)
    llm.assembly.cache.check()
    return fast, slow


def assert_close(fast: torch.Tensor, slow: torch.Tensor) -> None:
    assert fast.dtype == slow.dtype
    assert fast.shape == slow.shape
    error = (fast.float() - slow.float()).norm() / slow.float().norm()
    assert error <= TOLERANCE[fast.dtype] / 4


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 65),
    k=st.integers(1, models.EXPERTS),
    layer=st.integers(0, models.LAYERS - 1),
    seed=st.integers(0, 999),
)
def test_equals_the_reference(typed: LLM, tokens: int, k: int, layer: int, seed: int) -> None:
    fast, slow = both(typed, layer, work(typed, tokens, k, seed))
    assert_close(fast, slow)


@pytest.mark.parametrize("tokens", [1, 9])
def test_ids_beyond_the_experts_are_skipped(typed: LLM, tokens: int) -> None:
    case = work(typed, tokens, 3, seed=1)
    skipped = [case[0], case[1].clone(), case[2]]
    skipped[1][:, 1] = models.EXPERTS
    fast, slow = both(typed, 2, skipped)
    assert_close(fast, slow)
    skipped[1][0] = models.EXPERTS + 5
    fast, slow = both(typed, 2, skipped)
    assert torch.equal(fast[0], torch.zeros_like(fast[0]))
    if tokens > 1:
        assert_close(fast[1:], slow[1:])


def test_a_token_without_experts_gives_zero(typed: LLM) -> None:
    hidden, index, weights = work(typed, 1, 2, seed=3)
    fast, _ = both(typed, 0, [hidden, torch.full_like(index, models.EXPERTS), weights])
    assert torch.equal(fast, torch.zeros_like(hidden))


def test_an_expert_that_is_named_twice_counts_twice(typed: LLM) -> None:
    hidden, index, weights = work(typed, 1, 3, seed=4)
    index[0, 2] = index[0, 0]
    assert_close(*both(typed, 1, [hidden, index, weights]))


def test_weighted_sum_adds_in_router_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, and in any other order 1."""
    rows = torch.tensor([[[1e8], [1.0], [-1e8]], [[1e8], [-1e8], [1.0]]])
    assert weighted_sum(rows, torch.ones(2, 3)).tolist() == [[0.0], [1.0]]


def test_weighted_sum_is_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    rows = torch.tensor([[[256.0], [1.0], [1.0]]], dtype=torch.bfloat16)
    assert weighted_sum(rows, torch.ones(1, 3, dtype=torch.bfloat16)).tolist() == [[258.0]]
    # A product that bfloat16 would round.
    fine = torch.tensor([[[0.0], [1 + 2**-7]]], dtype=torch.bfloat16)
    assert weighted_sum(fine, fine[..., 0]).tolist() == [[(1 + 2**-7) ** 2]]


def experts_module(kind: Any, config: Any) -> Any:
    torch.manual_seed(1)
    module = kind(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.config._experts_implementation = "eager"
    return module


def by_hand(module: Any, split: bool, case: list[torch.Tensor]) -> torch.Tensor:
    """What `apply_expert` gives for views on the module's own parameters, weighted and summed."""
    hidden, index, weights = case
    out = torch.zeros_like(hidden)
    for token, k in np.ndindex(*index.shape):
        views: dict[str, tuple[torch.Tensor, ...]] = {}
        for name, parameter in module.named_parameters():
            tensor = parameter[index[token, k]]
            halves = split and name == "gate_up_proj"
            views[name] = tuple(tensor.chunk(2)) if halves else (tensor,)
        row = apply_expert(module, hidden[token : token + 1], views)[0]
        out[token] += row * weights[token, k]
    return out


def random_case(hidden: int, experts: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    index = torch.rand(7, experts, generator=random).topk(2).indices
    return [torch.randn(7, hidden, generator=random), index, torch.rand(7, 2, generator=random)]


@torch.no_grad()
def test_transposed_interleaved_experts_with_biases() -> None:
    """gpt-oss: every flag other than in the families that are served today."""
    config = GptOssConfig(
        hidden_size=24, intermediate_size=16, num_local_experts=5, num_experts_per_tok=2
    )
    module = experts_module(GptOssExperts, config)
    assert (module.is_transposed, module.has_bias, module.is_concatenated) == (True, True, False)
    case = random_case(24, 5)
    torch.testing.assert_close(by_hand(module, False, case), module(*case))


@pytest.mark.parametrize("split", [False, True], ids=["one block", "gate and up apart"])
@torch.no_grad()
def test_concatenated_experts_in_one_block_or_two(split: bool) -> None:
    config = models.FAMILIES["olmoe"][0](hidden_size=24, intermediate_size=16, num_experts=5)
    module = experts_module(OlmoeExperts, config)
    case = random_case(24, 5)
    torch.testing.assert_close(by_hand(module, split, case), module(*case))


@torch.no_grad()
def test_experts_without_a_gate() -> None:
    class Plain(torch.nn.Module):
        has_gate, is_transposed, has_post_expert_norm = False, False, False
        act_fn = staticmethod(functional.relu)

    random = torch.Generator().manual_seed(0)
    up, down = torch.randn(6, 4, generator=random), torch.randn(4, 6, generator=random)
    hidden = torch.randn(3, 4, generator=random)
    out = apply_expert(Plain(), hidden, {"up_proj": (up,), "down_proj": (down,)})
    torch.testing.assert_close(out, functional.relu(hidden @ up.T) @ down.T)


def test_the_reference_reads_what_the_cache_reads(olmoe: Path, checkpoints: Path) -> None:
    """Both forms of checkpoint, two independent readers, the same bytes."""
    from retinue.model.reference import read_expert

    for folder in (olmoe, models.fuse(olmoe, checkpoints / "reference-fused")):
        with models.open_llm(folder) as llm:
            cache, layouts = llm.assembly.cache, llm.assembly.network.experts.layouts
            cache.fetch(2, np.arange(models.EXPERTS))
            while not cache.has_all(2):
                cache.wait(1.0)
            for expert in range(models.EXPERTS):
                (slot,) = cache.use(2, [expert]).tolist()
                ours, plain = (
                    llm.assembly.host.views(2, expert, slot),
                    read_expert(layouts[2][expert]),
                )
                assert ours.keys() == plain.keys()
                for name in ours:
                    assert torch.equal(torch.cat(ours[name]), torch.cat(plain[name]))


def test_stop_is_asked_before_a_layer(olmoe: Path) -> None:
    with models.open_llm(olmoe) as llm:
        host = llm.assembly.engine._runner.host
        host.stop = lambda: True
        with pytest.raises(Cancelled), torch.inference_mode():
            host.run(0, *work(llm, 3, 2, seed=0))
        llm.assembly.cache.check()


class Gated(Reader):
    """Holds every read of experts back while `gate` is closed."""

    gate = threading.Event()

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        self.gate.wait(10)
        return super().read(file, offset, into, direct=direct)


def test_cancelled_reads_that_end_at_an_awkward_moment(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every slot is being read for another layer; those reads end just before room is sought."""
    monkeypatch.setattr("retinue.engine.assembly.Reader", Gated)
    Gated.gate.set()
    with models.open_llm(olmoe, preset="on-demand", experts="6.25%", self_check=False) as llm:
        cache, mover = llm.assembly.cache, llm.assembly.mover
        assert cache.slots == 2
        Gated.gate.clear()
        cache.begin_step("decode")
        cache.want(Want(3, np.arange(2), np.ones(2, np.float32)), limit=2)
        plain, calls = cache.reads.raise_failure, []

        def settle(*args: Any) -> None:
            plain(*args)
            calls.append(args)
            if len(calls) < 2:
                return  # the second one comes after a wait that was in vain
            Gated.gate.set()
            deadline = time.perf_counter() + 5
            while mover._running and time.perf_counter() < deadline:
                time.sleep(0.001)

        monkeypatch.setattr(cache.reads, "raise_failure", settle)
        case = work(llm, 1, 2, seed=0)
        fast, slow = both(llm, 0, case)
        assert_close(fast, slow)


def test_a_wrong_forecast_gives_its_slot_to_what_is_needed(olmoe: Path) -> None:
    """A want that no thread has begun leaves at once: nobody else is evicted for it."""
    with models.open_llm(olmoe, preset="on-demand", experts="12.5%", self_check=False) as llm:
        cache, mover = llm.assembly.cache, llm.assembly.mover
        cache.begin_step("decode")
        cache.begin_layer(0)
        cache.fetch(0, np.array([0, 1, 2]))
        while cache.resident < 3:
            cache.wait(1.0)
        with mover._changed:  # no reader can begin
            plain, cache.reads.link = cache.reads.link, _Queue()
            cache.want(Want(1, np.array([5]), np.ones(1, np.float32)), limit=2)
            cache.drop_wants(1, np.array([6]))
            assert cache.room(1)
            cache.reads.link = plain
        assert cache.resident == 3
        cache.touch(Demand(0, np.array([0]), np.array([1]), np.array([1.0], np.float32)), 1)
        cache.check()


class _Queue:
    """A link whose readers never come."""

    def submit(self, expert: Any, slot: int, urgency: Urgency, precision: int) -> Any:
        return _Ticket(urgency)

    def cancel(self, ticket: Any) -> None:
        ticket.settled = True


class _Ticket:
    settled = False

    def __init__(self, urgency: Urgency) -> None:
        self.urgency = urgency
