"""Precisions that published checkpoints store weights in: sizes, encode, decode.

A format keeps a parameter as two tensors, small weights and the scales of groups of them. What is
decoded is exact: the number that the two stand for, rounded once to the type that is asked for.
Decoding looks up a table and needs little memory besides the result.

MXFP4 and its scales (E8M0: powers of two, 255 is no number) are those of the OCP Microscaling
specification 1.0, arXiv:2310.10537. FP8 in blocks is that of DeepSeek-V3, arXiv:2412.19437.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import ClassVar, Protocol

import torch
from torch.nn import functional

Shape = tuple[int, ...]

GROUP = 32  # MXFP4 weights under one scale
FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 by its lower three bits; the fourth: minus
FLOAT8_MAX = 448.0
SCRATCH_VALUES = 1 << 17  # decoded at a time: what stays in a core's cache

_PAIRS = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}


class Format(Protocol):
    """How one parameter is stored as weights and scales."""

    @property
    def name(self) -> str:
        """What users call it."""

    def shape(self, weights: Shape, scales: Shape) -> Shape | None:
        """The parameter's shape; None when the two do not belong together."""

    def decode(
        self, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The parameter, in bfloat16, float16 or float32."""

    def encode(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest that the format can say: weights and scales."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A parameter, or a block of its rows, in its stored precision."""

    format: Format
    weights: torch.Tensor
    scales: torch.Tensor

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that it stands for, in memory of their own."""
        return self.format.decode(self.weights, self.scales, dtype)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Four bits a weight and a power of two for 32 of them: 4.25 bits.

    weights: uint8 [..., out, groups, 16], the first of two in the lower bits; scales: uint8
    [..., out, groups]. They lie by output, as gpt-oss publishes them, whose parameter is
    [..., in, out]: the decoded parameter is a transposed view.
    """

    name: ClassVar[str] = "mxfp4"

    def shape(self, weights: Shape, scales: Shape) -> Shape | None:
        """[..., in, out]."""
        if len(weights) < 3 or weights[:-1] != scales or weights[-1] != GROUP // 2:
            return None
        *before, out, groups, _ = weights
        return (*before, groups * GROUP, out)

    def decode(
        self, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """One look-up a byte, in a table of all pairs of weights under all scales."""
        table = _pair_table(dtype)
        codes, exponents = weights.reshape(-1, GROUP // 2), scales.reshape(-1, 1)
        out = torch.empty(codes.numel(), dtype=table.dtype)
        step = SCRATCH_VALUES // GROUP
        for start in range(0, len(codes), step):
            index = exponents[start : start + step].to(torch.int32) << 8
            index = (index + codes[start : start + step]).reshape(-1)
            place = start * GROUP // 2
            torch.index_select(table, 0, index, out=out[place : place + len(index)])
        *before, rows, groups = scales.shape
        return out.view(dtype).view(*before, rows, groups * GROUP).transpose(-1, -2)

    def encode(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """parameter: [..., in, out], `in` a multiple of 32. Ties go to the even code."""
        rows = parameter.float().transpose(-1, -2)
        groups = rows.reshape(*rows.shape[:-1], -1, GROUP)
        _, exponent = torch.frexp(groups.abs().amax(-1))
        # The largest of a group comes to lie between 4 and 8; what exceeds 6 becomes 6.
        scales = (exponent - 3 + 127).clamp(0, 254).to(torch.uint8)
        # In fp64 the division by the smallest scales is exact too.
        scaled = (groups.double() / e8m0_values(scales).double().unsqueeze(-1)).contiguous()
        codes = torch.bucketize(scaled.abs(), _borders()).to(torch.uint8)
        codes |= scaled.signbit().to(torch.uint8) << 3
        return codes[..., 0::2] | codes[..., 1::2] << 4, scales


@dataclass(frozen=True, slots=True)
class Float8:
    """A byte a weight (E4M3) and a factor for each block; `block` None: one for all.

    weights: float8 [..., out, in]; scales, by which weights are multiplied: [..., ceil(out /
    height), ceil(in / width)] in any floating type, or uint8 for E8M0. One scale counts for all.
    """

    block: tuple[int, int] | None
    name: ClassVar[str] = "fp8"

    def shape(self, weights: Shape, scales: Shape) -> Shape | None:
        """That of the weights."""
        if len(weights) < 2:
            return None
        *before, rows, columns = weights
        grids = [(*before, 1, 1)]
        if not before:
            grids += [(), (1,)]
        if self.block is not None:
            grids.append((*before, -(-rows // self.block[0]), -(-columns // self.block[1])))
        return weights if scales in grids else None

    def decode(
        self, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """weights: [out, in]. Looked up and multiplied in fp32, then rounded to `dtype`."""
        rows, columns = weights.shape
        height, width = self._block(rows, columns, scales)
        factors = scale_values(scales).reshape(-(-rows // height), -(-columns // width))
        factors = factors.repeat_interleave(width, 1)[:, :columns]
        codes, table = weights.view(torch.uint8), _float8_table()
        out = torch.empty(rows, columns, dtype=dtype)
        for start, stop in _bands(rows, height, columns):
            index = codes[start:stop].reshape(-1).to(torch.int32)
            values = table.index_select(0, index).view(stop - start, columns)
            out[start:stop] = values.mul_(factors[start // height])
        return out

    def encode(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """parameter: [out, in]. Scales are fp32, so that a block's largest becomes 448."""
        rows, columns = parameter.shape
        height, width = self.block or (rows, columns)
        down, across = -(-rows // height), -(-columns // width)
        margins = (0, across * width - columns, 0, down * height - rows)
        padded = functional.pad(parameter.float(), margins)
        largest = padded.view(down, height, across, width).abs().amax((1, 3))
        scales = torch.where(largest > 0, largest / FLOAT8_MAX, torch.ones_like(largest))
        spread = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
        scaled = (padded / spread)[:rows, :columns].clamp(-FLOAT8_MAX, FLOAT8_MAX)
        return scaled.to(torch.float8_e4m3fn), scales if self.block else scales.reshape(())

    def _block(self, rows: int, columns: int, scales: torch.Tensor) -> tuple[int, int]:
        return (rows, columns) if self.block is None or scales.numel() == 1 else self.block


@dataclass(frozen=True, slots=True)
class Transposed:
    """`format` for a family whose parameter is the transposed of what is stored."""

    format: Format

    @property
    def name(self) -> str:
        """That of the format."""
        return self.format.name

    def shape(self, weights: Shape, scales: Shape) -> Shape | None:
        """[..., in, out] where the format has [..., out, in]."""
        plain = self.format.shape(weights, scales)
        return None if plain is None else (*plain[:-2], plain[-1], plain[-2])

    def decode(
        self, weights: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """A transposed view of what the format decodes."""
        return self.format.decode(weights, scales, dtype).transpose(-1, -2)

    def encode(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the format encodes of the transposed."""
        return self.format.encode(parameter.transpose(-1, -2))


def e8m0_values(codes: torch.Tensor) -> torch.Tensor:
    """The powers of two that uint8 `codes` stand for, in fp32; 255 is NaN."""
    return _e8m0_table()[codes.to(torch.int32)]


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Scales of any stored type in fp32."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return e8m0_values(scales.view(torch.uint8))
    return scales.float()


def _bands(rows: int, height: int, columns: int) -> list[tuple[int, int]]:
    """`[start, stop)` of rows that are decoded at once: all in one row of blocks."""
    step = max(1, SCRATCH_VALUES // columns)
    return [
        (start, min(start + step, top + height, rows))
        for top in range(0, rows, height)
        for start in range(top, min(top + height, rows), step)
    ]


@cache
def _e8m0_table() -> torch.Tensor:
    table = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127).float()
    table[255] = torch.nan
    return table


@cache
def _float8_table() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@cache
def _pair_table(dtype: torch.dtype) -> torch.Tensor:
    """Entry `scale << 8 | byte` holds the byte's two weights in `dtype`, as one integer."""
    signed = torch.tensor([sign * value for sign, value in product((1.0, -1.0), FLOAT4)])
    byte = torch.arange(256)
    pairs = torch.stack([signed[byte & 15], signed[byte >> 4]], dim=-1)
    values = e8m0_values(torch.arange(256, dtype=torch.uint8)).view(-1, 1, 1) * pairs
    return values.to(dtype).view(-1).view(_PAIRS[dtype])


@cache
def _borders() -> torch.Tensor:
    """The largest magnitudes that are rounded to each code but the last."""
    values = torch.tensor(FLOAT4, dtype=torch.float64)
    middles = (values[1:] + values[:-1]) / 2
    # From every second one a tie goes up, to the even code.
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros((), dtype=torch.float64))
    return middles
