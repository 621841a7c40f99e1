"""The native library's small instructions, against torch's own."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from retinue.memory import native
from retinue.metrics import Clock
from retinue.model.program import Memory, Program, Spans
from retinue.model.record import Recording, _needed, _Recorder

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
EXACT: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "add alpha": lambda a, b: torch.add(a, b, alpha=0.5),
    "broadcast": lambda a, b: a[:, :1] * b,
    "number": lambda a, b: (a * 1.7 - 3) / 0.3,
    "types": lambda a, b: (a.float() * b).to(a.dtype),
    "square": lambda a, b: a.pow(2) + a.square(),
    "transposed": lambda a, b: a.t().contiguous().t() + b,
    "strided": lambda a, b: a[::2, 1::3] - b[::2, 1::3],
    "four dimensions": lambda a, b: a.view(2, 4, 5, 60).permute(3, 0, 2, 1) * b.view(-1)[0],
    "rotate": lambda a, b: torch.cat([-a[:, 150:], b[:, :150]], dim=-1),
    "stack": lambda a, b: torch.stack([a, b], dim=1).flatten(1),
    "compare": lambda a, b: torch.where((a > b) | (a == 0), a, b) * (a <= b),
    "fill": lambda a, b: a.masked_fill(b > 0, float("-inf")).clamp(-2, 2),
    "in place": lambda a, b: a.clone().add_(b).mul_(2),
    "relu": lambda a, b: torch.relu(a) + b.abs() - torch.maximum(a, b),
    "best": lambda a, b: torch.topk(a, 5, dim=-1)[0],
    "best places": lambda a, b: torch.topk(a, 5, dim=-1)[1] * 2,
    "one in sixty-four": lambda a, b: torch.topk(a, 3, dim=-1)[1] + 1,
    "pick": lambda a, b: a.gather(1, torch.topk(b, 4, dim=-1)[1]),
    "put": lambda a, b: torch.zeros_like(a).scatter_(1, torch.topk(b, 4, dim=-1)[1], 1.0) + a,
    "rows": lambda a, b: functional.embedding(torch.topk(b[:, :8], 4, dim=-1)[1], a) + 1,
    "largest": lambda a, b: a.amax(-1, keepdim=True) - b.amin(0),
}
CLOSE: dict[str, Function] = {
    "norm": lambda a, b: a * torch.rsqrt(a.float().pow(2).mean(-1, keepdim=True) + 1e-6) * b,
    "softmax": lambda a, b: torch.softmax(a * 9, dim=-1, dtype=torch.float32) - b,
    "softmax of columns": lambda a, b: torch.softmax(a.float(), dim=0),
    "sums": lambda a, b: a.float().sum(0) + b.float().mean(-1)[0],
    "silu": lambda a, b: functional.silu(a * 20) * b,
    "gelu": lambda a, b: functional.gelu(a) + functional.gelu(b, approximate="tanh"),
    "sigmoid": lambda a, b: torch.sigmoid(a * 30) + torch.tanh(b),
    "exponents": lambda a, b: torch.exp(a * 20).log() + b.abs().sqrt() + functional.softplus(a),
    "turns": lambda a, b: torch.sin(a * 50) + torch.cos(b * 500),
}


def evaluated(function: Function, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`function` recorded with other numbers, then run natively on these."""
    inputs = [torch.zeros_like(a), torch.zeros_like(b)]
    recorder = _Recorder()
    with torch.inference_mode():
        with recorder:
            out = function(*inputs)
        found = recorder.ref(out)
        recording = Recording(_needed(recorder.operations, found), recorder.constants, found)
        library = native.library()
        assert library is not None
        program = Program(recording, library, Memory({}, no_spans), Clock())
        for into, value in zip(inputs, (a, b), strict=True):
            into.copy_(value)
        program.run()
    assert len(program._calls) == 1, "some of it was run by torch"
    return program.logits.clone()


def no_spans(window: int | None) -> Spans:
    raise AssertionError(window)


def numbers(dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(8, 300, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_equals_torch_to_the_bit(name: str, dtype: torch.dtype) -> None:
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    got, wanted = evaluated(EXACT[name], a, b), EXACT[name](a, b)
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLOSE)
def test_equals_torch_to_rounding(name: str, dtype: torch.dtype) -> None:
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    got, wanted = evaluated(CLOSE[name], a, b), CLOSE[name](a, b)
    exact = wanted.dtype == torch.float32 == dtype
    rounding = {"rtol": 1e-5, "atol": 2e-6} if exact else {"rtol": 2**-7, "atol": 1e-3}
    torch.testing.assert_close(got, wanted, **rounding)


def test_no_number_is_lost_at_the_ends_of_the_exponential() -> None:
    a = torch.tensor([-1e30, -104.0, -87.5, -86.0, -0.0, 1e-7, 88.0, 88.7, 89.0, float("nan")])
    got = evaluated(lambda a, b: torch.exp(a), a, a)
    torch.testing.assert_close(got, a.exp(), rtol=1e-6, atol=1e-37, equal_nan=True)
