"""A linear layer whose weights stay in int8 or int4."""

import time

import torch
from torch import nn
from torch.nn import functional

from retinue.memory import native
from retinue.memory.grouped import LANES, Grouped
from retinue.metrics import Clock

_NATIVE = {8: native.Format.INT8, 4: native.Format.INT4}


class GroupedLinear(nn.Module):
    """`nn.Linear` for inference over weights in a grouped format.

    Natively the inputs are quantised as well, see `native/retinue.h`. Without the kernels some
    rows at a time are decoded, so that the scratch stays small. `clock` counts its time, and
    `dtype` is that of the model, for those who ask for its weights.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        form: Grouped,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        clock: Clock | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self._clock = clock or Clock()
        self.form, self.in_features, self.out_features = form, form.columns, form.rows
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._dtype = dtype
        self._library = native.library()
        self.matrix = native.matrix(_NATIVE[form.bits], form.rows, form.columns, codes, scales)

    @property
    def weight(self) -> torch.Tensor:
        """All of it, decoded: for the few modules that look at a linear layer's weights."""
        return self.form.decode(self.codes, self.scales, self._dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., in_features]; returns [..., out_features], in the same type."""
        started = time.perf_counter()
        output = self._apply_to(input)
        self._clock.seconds += time.perf_counter() - started
        return output

    def _apply_to(self, input: torch.Tensor) -> torch.Tensor:
        if self._library is not None:
            return self._library.linear(self.matrix, input.contiguous(), self.bias)
        out = _decoded_product(self.form, self.codes, self.scales, input)
        return out if self.bias is None else out.add_(self.bias)


def grouped_product(
    form: Grouped, codes: torch.Tensor, scales: torch.Tensor, inputs: torch.Tensor
) -> torch.Tensor:
    """`inputs [n, columns]` times the transposed matrix: [n, rows], in the inputs' type."""
    if (library := native.library()) is None:
        return _decoded_product(form, codes, scales, inputs)
    matrix = native.matrix(_NATIVE[form.bits], form.rows, form.columns, codes, scales)
    return library.linear(matrix, inputs.contiguous())


def _decoded_product(
    form: Grouped, codes: torch.Tensor, scales: torch.Tensor, inputs: torch.Tensor
) -> torch.Tensor:
    out = inputs.new_empty((*inputs.shape[:-1], form.rows))
    for start, stop in form.bands():
        tiles = slice(start // LANES, -(-stop // LANES))
        rows = Grouped(form.bits, stop - start, form.columns)
        weight = rows.decode(codes[tiles], scales[tiles], inputs.dtype)
        out[..., start:stop] = functional.linear(inputs, weight)
    return out
