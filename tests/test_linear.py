"""The linear layer for one row gives what `nn.Linear` gives, and keeps its parameters."""

import pytest
import torch
from torch import nn

from retinue.model.linear import RowLinear, use_row_linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 48), (48,), (3, 48), (2, 5, 48), (1, 48)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_it_equals_the_plain_layer(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(len(shape))
    plain = nn.Linear(48, 33, bias=bias, dtype=dtype)
    model = nn.Sequential(plain)
    use_row_linears(model)
    assert type(model[0]) is RowLinear
    assert model[0].weight is plain.weight
    inputs = torch.randn(*shape).to(dtype)
    torch.testing.assert_close(model(inputs), plain(inputs))


def test_other_kinds_of_linear_layers_stay() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(4, 4))
    use_row_linears(model)
    assert type(model[0]) is Own
