"""A linear layer that reads its weights faster when there are few rows, as in decoding."""

import time

import torch
from torch import nn
from torch.nn import functional

from retinue.memory import native
from retinue.memory.native import Format, Matrix
from retinue.metrics import Clock

FEW_ROWS = 64  # of bfloat16; from about 100 on torch is faster, see docs/LOG.md


def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`inputs [rows, in] @ weight.T`, weight [out, in]. The way depends on the rows alone.

    Natively where the library is there, for few rows of bfloat16. Else, a matrix-vector product is
    a fifth faster than a matrix product with one row.
    """
    rows = inputs.shape[0]
    # A step that is recorded has to show which product it is.
    watched = torch._C._len_torch_dispatch_stack() > 0
    if rows <= FEW_ROWS and inputs.dtype == weight.dtype == torch.bfloat16 and not watched:
        library = native.library()
        if library is not None and weight.is_cpu and weight.is_contiguous():
            matrix = Matrix(weight.data_ptr(), None, Format.BF16, *weight.shape)
            return library.linear(matrix, inputs)
    if rows == 1:
        return torch.mv(weight, inputs[0]).unsqueeze(0)
    return functional.linear(inputs, weight)


class RowLinear(nn.Linear):
    """`nn.Linear` for inference, with `product` for few rows. `clock` counts its time."""

    clock: Clock

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., in_features]; returns [..., out_features]."""
        started = time.perf_counter()
        output = self._apply_to(input)
        self.clock.seconds += time.perf_counter() - started
        return output

    def _apply_to(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() > FEW_ROWS * self.in_features or self._parameters["bias"] is not None:
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        return product(rows, self.weight).view(*input.shape[:-1], -1)


def use_row_linears(model: nn.Module) -> Clock:
    """Put a RowLinear with the same parameters in the place of each plain `nn.Linear`.

    Returns the clock that all of them share.
    """
    clock = Clock()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                bias = child._parameters["bias"] is not None
                replacement = RowLinear(child.in_features, child.out_features, bias, device="meta")
                replacement.weight, replacement.bias = child.weight, child.bias
                replacement.clock = clock
                setattr(module, name, replacement)
    return clock
