"""Which experts the native kernels run, and that they give what torch gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import models
from retinue.memory import native
from retinue.memory.formats import Packed, Transposed
from retinue.memory.grouped import Grouped
from retinue.memory.native import Activation
from retinue.model import kernels
from retinue.model.reference import reference_experts
from retinue.model.work import apply_expert

needs_library = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))


class Gated(torch.nn.Module):
    """What an experts module says of itself."""

    has_gate, has_bias, has_post_expert_norm = True, False, False
    is_concatenated, is_transposed = True, False

    def __init__(self, gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._gate = gate

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._gate(*gate_up.chunk(2, dim=-1))


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (lambda g, u: functional.silu(g) * u, Activation.SILU),
        (lambda g, u: functional.gelu(g) * u, Activation.GELU),
        (lambda g, u: functional.gelu(g, approximate="tanh") * u, Activation.GELU_TANH),
        (lambda g, u: functional.relu(g) * u, Activation.RELU),
        (lambda g, u: functional.silu(u) * g, None),
        (lambda g, u: functional.silu(g.clamp(max=7)) * u, None),
        (lambda g, u: functional.silu(g) * u.clamp(-100, 100), None),
        (lambda g, u: functional.silu(g) * (u + 1), None),
        (lambda g, u: functional.silu(1.702 * g) * u, None),
    ],
)
def test_activations_are_tried(gate: Any, expected: Activation | None) -> None:
    assert kernels._activation(Gated(gate)) is expected


@pytest.mark.parametrize(
    "flag", ["has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "has_gate"]
)
def test_other_forms_are_left_to_torch(flag: str) -> None:
    module = Gated(lambda g, u: functional.silu(g) * u)
    setattr(module, flag, not getattr(module, flag))
    assert kernels._activation(module) is None


def host_of(llm: Any) -> Any:
    return llm.assembly.engine._runner.host


def case_of(tokens: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 64, generator=random).to(dtype)
    index = torch.rand(tokens, models.EXPERTS, generator=random).topk(k).indices
    return [hidden, index, torch.rand(tokens, k, generator=random).to(dtype)]


@needs_library
@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
def test_bfloat16_experts_run_natively(fused: bool, checkpoints: Path) -> None:
    folder = models.make(checkpoints / "kernels", "olmoe", torch.bfloat16)
    if fused:
        folder = models.fuse(folder, checkpoints / "kernels-fused")
    with models.open_llm(folder) as llm, torch.inference_mode():
        host, experts = host_of(llm), llm.assembly.network.experts
        assert host.kernels.keys() == {found.layer for found in experts.modules}
        for tokens in (1, 3, kernels.MOST_PLAIN_TOKENS + 1, 200):
            case = case_of(tokens, 2, torch.bfloat16)
            case[1][-1, 0] = models.EXPERTS  # no expert: its row counts for nothing
            llm.assembly.cache.begin_step("decode")
            fast = host.run(1, *case).float()
            slow = reference_experts(experts.modules[1].module, experts.layouts[1], *case).float()
            assert (fast - slow).norm() <= 4e-3 * slow.norm()
        llm.assembly.cache.check()


@needs_library
def test_the_path_of_one_token_is_the_path_of_many(checkpoints: Path) -> None:
    """With every expert at hand one token takes a shorter way: the same bits and counts."""
    folder = models.make(checkpoints / "kernels", "olmoe", torch.bfloat16)
    with models.open_llm(folder) as llm, torch.inference_mode():
        host, cache = host_of(llm), llm.assembly.cache
        cache.fetch(1, np.arange(models.EXPERTS))
        while not cache.has_all(1):
            cache.wait(1.0)
        hidden, index, weights = case_of(1, 3, torch.bfloat16)
        together = host.run(1, hidden.repeat(2, 1), index.repeat(2, 1), weights.repeat(2, 1))
        counters = llm.assembly.metrics.begin("decode")
        alone = host.run(1, hidden, index, weights)
        assert counters.hits == 3
        assert torch.equal(alone[0], together[0])
        assert (cache.last_used[1, index[0]] == cache.step).all()
        # An expert that counts for nothing, and a number beyond all experts.
        without = weights * torch.tensor([[1, 0, 1]])
        nothing = host.run(1, hidden, index, without)
        index[0, 1] = models.EXPERTS + 3
        assert torch.equal(host.run(1, hidden, index, weights), nothing)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_left_to_torch(dtype: torch.dtype, checkpoints: Path) -> None:
    folder = models.make(checkpoints / f"kernels-{dtype}", "olmoe", dtype)
    with models.open_llm(folder) as llm:
        assert not host_of(llm).kernels


def test_without_the_library_torch_runs_all(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.make(checkpoints / "kernels", "olmoe", torch.bfloat16)
    monkeypatch.setattr(native, "library", lambda: None)
    with models.open_llm(folder) as llm:
        assert not host_of(llm).kernels
        assert len(llm.generate([[5, 6, 7]], models.greedy(3))[0].token_ids) == 3


@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_forms_that_no_kernel_knows_multiply_what_is_stored(
    bits: int, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases, a transposed and interleaved parameter, odd sizes: as in gpt-oss."""
    if not with_library:
        monkeypatch.setattr(native, "library", lambda: None)
    module = Gated(lambda g, u: functional.silu(g) * u)
    module.is_transposed, module.has_bias = True, True
    random = torch.Generator().manual_seed(bits)
    up, down = torch.randn(70, 44, generator=random), torch.randn(44, 35, generator=random)
    bias = torch.randn(70, generator=random)
    plain, packed = {"gate_up_proj_bias": (bias,)}, {"gate_up_proj_bias": (bias,)}
    for name, matrix in (("gate_up_proj", up), ("down_proj", down)):
        form = Grouped(bits, *matrix.shape)
        packed[name] = (Packed(Transposed(form), *form.encode(matrix)),)
        plain[name] = (packed[name][0].decode(torch.float32),)
        assert plain[name][0].shape == matrix.T.shape
    hidden = torch.randn(5, 44, generator=random)
    fast, slow = (apply_expert(module, hidden, views) for views in (packed, plain))
    assert (fast - slow).norm() <= (2e-2 if with_library else 1e-5) * slow.norm()
