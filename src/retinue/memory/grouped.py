"""int8 and int4: groups of 32 weights with one scale each, in tiles that kernels read in order.

A matrix is [rows, columns], one row an output. A tile is 16 rows by one group of columns; where
rows or columns end within a tile, the rest is zero and counts for nothing. `native/retinue.h` has
the bytes. The numbers here are the truth that kernels are tested against.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from retinue.memory import native
from retinue.memory.formats import Format, Shape, Transposed

LANES, GROUP = 16, 32
PRECISIONS = {"int8": 8, "int4": 4}
BLOCK_VALUES = 1 << 19  # of a matrix, encoded or decoded at a time: what bounds the scratch

_NATIVE = {8: native.Format.INT8, 4: native.Format.INT4}
_NATIVE_TYPES = (torch.float32, torch.bfloat16, torch.float16)

# The largest magnitude of a group of int4 comes to lie on -8 times one of these. A larger scale
# than 1 leaves room for the largest of the other sign, a smaller one cuts the largest off.
_STRETCHES = (1.14, 1.07, 1.03, 1.0, 0.97, 0.93, 0.89, 0.84)


@dataclass(frozen=True, slots=True)
class Grouped:
    """A matrix [rows, columns] with `bits` 8 or 4 a weight, and a bf16 scale for 32 of them.

    weights: uint8 [tiles down, groups, 8 or 4, 16, 4]; scales: bf16 [tiles down, groups, 16].
    """

    bits: int
    rows: int
    columns: int

    @property
    def name(self) -> str:
        """`int8` or `int4`."""
        return f"int{self.bits}"

    @property
    def weights_shape(self) -> Shape:
        """Of the tensor of codes."""
        return (-(-self.rows // LANES), -(-self.columns // GROUP), self.bits, LANES, 4)

    @property
    def scales_shape(self) -> Shape:
        """Of the tensor of scales."""
        return (-(-self.rows // LANES), -(-self.columns // GROUP), LANES)

    @property
    def stored_bytes(self) -> int:
        """Of codes and scales together."""
        tiles = -(-self.rows // LANES) * -(-self.columns // GROUP)
        return tiles * LANES * (4 * self.bits + 2)

    def shape(self, weights: Shape, scales: Shape) -> Shape | None:
        """[rows, columns]."""
        fits = weights == self.weights_shape and scales == self.scales_shape
        return (self.rows, self.columns) if fits else None

    def decode(
        self, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Each product of a code and its scale is exact in fp32 and rounded once."""
        out = torch.empty(self.rows, self.columns, dtype=dtype)
        for start, stop in self.bands():
            tiles = slice(start // LANES, -(-stop // LANES))
            values = _values(weights[tiles], self.bits).float()  # [tiles, lanes, groups, 32]
            values *= scales[tiles].transpose(1, 2).unsqueeze(-1)
            flat = values.view(-1, self.scales_shape[1] * GROUP)
            out[start:stop] = flat[: stop - start, : self.columns]
        return out

    def encode(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """parameter: [rows, columns] of any floating type."""
        weights = torch.empty(self.weights_shape, dtype=torch.uint8)
        scales = torch.empty(self.scales_shape, dtype=torch.bfloat16)
        self.encode_into(parameter, weights, scales)
        return weights, scales

    def encode_into(
        self, parameter: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """The same into memory that is there: a slot, or a file's."""
        across = self.scales_shape[1]
        for start, stop in self.bands():
            first, last = start // LANES, -(-stop // LANES)
            margins = (0, across * GROUP - self.columns, 0, last * LANES - stop)
            padded = functional.pad(parameter[start:stop].float(), margins)
            groups = padded.view(last - first, LANES, across, GROUP)
            codes, found = _nearest4(groups) if self.bits == 4 else _nearest8(groups)
            weights[first:last] = _tiled(codes, self.bits)
            scales[first:last] = found.squeeze(-1).transpose(1, 2)

    def bands(self) -> Iterator[tuple[int, int]]:
        """`[start, stop)` of rows that are worked on at a time: whole tiles."""
        step = max(1, BLOCK_VALUES // (LANES * GROUP * self.scales_shape[1])) * LANES
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


def encode(
    form: Grouped, parameter: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor
) -> None:
    """Encode [rows, columns] into memory that is there, natively where that is possible."""
    library = native.library()
    if library is None or parameter.dtype not in _NATIVE_TYPES:
        form.encode_into(parameter, weights, scales)
        return
    rows = parameter if parameter.stride(-1) == 1 else parameter.contiguous()
    codes, found = library.encode(rows, _NATIVE[form.bits])
    weights.copy_(codes.view(weights.shape))
    scales.copy_(found.view(torch.bfloat16).view(scales.shape))


def grouped(precision: str, rows: int, columns: int, *, transposed: bool = False) -> Format:
    """The format of a matrix whose parameter is [rows, columns], or its transposed."""
    plain = Grouped(PRECISIONS[precision], rows, columns)
    return Transposed(plain) if transposed else plain


def grouped_form(form: Format) -> Grouped | None:
    """The matrix [outputs, inputs] that is stored, also where the parameter is transposed."""
    stored = form.format if isinstance(form, Transposed) else form
    return stored if isinstance(stored, Grouped) else None


def _nearest4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -8..7 [..., 32] and scales [..., 1], the best of several by the squared error."""
    at = groups.abs().argmax(-1, keepdim=True)
    whole = groups.gather(-1, at) / -8
    best = torch.full_like(whole, torch.inf)
    codes, scales = torch.zeros_like(groups), whole.bfloat16()
    for stretch in _STRETCHES:
        scale = (whole * stretch).bfloat16()
        rounded = _rounded(groups, scale.float(), -8, 7)
        # The scale that is the best for these codes; rarely another code is nearer to it.
        fitted = (groups * rounded).sum(-1, keepdim=True) / rounded.square().sum(-1, keepdim=True)
        scale = torch.where(fitted.isfinite() & (fitted != 0), fitted, scale.float()).bfloat16()
        rounded = _rounded(groups, scale.float(), -8, 7)
        error = (groups - rounded * scale).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        codes = torch.where(better, rounded, codes)
    return codes, scales


def _nearest8(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -127..127 [..., 32] and scales [..., 1]."""
    scales = (groups.abs().amax(-1, keepdim=True) / 127).bfloat16()
    return _rounded(groups, scales.float(), -127, 127), scales


def _rounded(groups: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The nearest codes; 0 where a group is zero, or no number."""
    codes = groups / scales
    return codes.nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(low, high)


def _tiled(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[tiles, lanes, groups, 32] as stored bytes [tiles, groups, bits, lanes, 4]."""
    stored = (codes + (1 << bits - 1)).to(torch.uint8)
    down, lanes, across, _ = stored.shape
    quads = stored.view(down, lanes, across, 8, 4).permute(0, 2, 3, 1, 4)
    return quads if bits == 8 else quads[:, :, 0::2] | quads[:, :, 1::2] << 4


def _values(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Stored bytes as int16 [tiles, lanes, groups, 32]."""
    if bits == 4:
        stored = torch.stack([stored & 15, stored >> 4], dim=3).flatten(2, 3)
    values = stored.to(torch.int16) - (1 << bits - 1)
    down, across, _, lanes, _ = values.shape
    return values.permute(0, 3, 1, 2, 4).reshape(down, lanes, across, GROUP)
