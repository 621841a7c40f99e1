"""The linear layer for one row gives what `nn.Linear` gives, and keeps its parameters."""

import pytest
import torch
from torch import nn

from retinue.metrics import Clock
from retinue.model import linear
from retinue.model.linear import RowLinear, use_row_linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 48), (48,), (3, 48), (2, 5, 48), (1, 48)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_it_equals_the_plain_layer(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(len(shape))
    plain = nn.Linear(48, 33, bias=bias, dtype=dtype)
    model = nn.Sequential(plain)
    clock = use_row_linears(model)
    assert type(model[0]) is RowLinear
    assert model[0].weight is plain.weight
    inputs = torch.randn(*shape).to(dtype)
    torch.testing.assert_close(model(inputs), plain(inputs))
    assert clock.seconds > 0


def test_all_layers_of_a_model_share_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of this clock is a second after the one before, so a layer takes one."""
    ticks = iter(range(100))
    monkeypatch.setattr(linear.time, "perf_counter", lambda: float(next(ticks)))
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    clock = use_row_linears(model)
    with torch.inference_mode():
        model(torch.zeros(1, 4))
        model(torch.zeros(3, 4))
    assert clock == Clock(4.0)


def test_other_kinds_of_linear_layers_stay() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 4))
    use_row_linears(model)
    assert type(model[0]) is Own
