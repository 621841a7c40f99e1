"""Formats against their definitions, element by element, and against transformers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantised
from disk import STEADY
from retinue.memory import formats
from retinue.memory.formats import Float8, Mxfp4, Packed, e8m0_values, scale_values

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODES = torch.arange(256, dtype=torch.uint8)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in every bit, but that one NaN is as good as another."""
    assert got.dtype == expected.dtype
    signs = (torch.signbit(got) == torch.signbit(expected)) | got.isnan()
    return torch.equal(got.nan_to_num(7), expected.nan_to_num(7)) and bool(signs.all())


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


# --- MXFP4


def all_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte under every scale: a row for each scale."""
    blocks = CODES.view(1, 16, 16).expand(256, 16, 16).contiguous()
    return blocks, CODES.view(256, 1).expand(256, 16).contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_under_every_scale(dtype: torch.dtype) -> None:
    blocks, scales = all_pairs()
    got = Mxfp4().decode(blocks, scales, dtype)
    assert same(got, quantised.mxfp4_by_hand(blocks, scales).to(dtype))
    assert got[:, 255].isnan().all()
    assert got.shape == (512, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_is_what_transformers_makes_of_it(dtype: torch.dtype) -> None:
    """But for the scale that is no number, of which transformers makes numbers."""
    blocks, scales = (part[:255] for part in all_pairs())
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]
    assert same(Mxfp4().decode(blocks, scales, dtype), expected)


@pytest.mark.parametrize("rows", [1, 3, 31, 77])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_mxfp4_of_any_shape(rows: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several at once, and cut anywhere."""
    blocks, scales = random_codes(2, rows, groups, 16), random_codes(2, rows, groups, seed=1)
    got = Mxfp4().decode(blocks, scales, torch.bfloat16)
    assert Mxfp4().shape(blocks.shape, scales.shape) == got.shape == (2, groups * 32, rows)
    for index in range(2):
        by_hand = quantised.mxfp4_by_hand(blocks[index], scales[index])
        assert same(got[index], by_hand.bfloat16())
    monkeypatch.setattr(formats, "SCRATCH_VALUES", 32)
    assert same(Mxfp4().decode(blocks, scales, torch.bfloat16), got)


def test_mxfp4_takes_four_and_a_quarter_bits() -> None:
    parts = Mxfp4().encode(torch.zeros(64, 6))
    assert sum(part.numel() * part.itemsize for part in parts) * 8 == 4.25 * 64 * 6


def test_mxfp4_rounds_to_the_nearest_and_ties_to_even() -> None:
    grid = torch.tensor(formats.FLOAT4)
    values = torch.linspace(-7, 7, 113)  # eighths, so that all ties are among them
    column = torch.zeros(32 * len(values), 1)
    column[::32, 0], column[1::32, 0] = values, 6.0  # the second fixes the scale at one
    parts = Mxfp4().encode(column)
    assert parts[1].eq(127).all()
    got = Mxfp4().decode(*parts, torch.float32)[::32, 0]
    for value, rounded in zip(values.tolist(), got.tolist(), strict=True):
        distances = (grid - abs(value)).abs()
        nearest = [i for i in range(8) if distances[i] == distances.min()]
        code = next(i for i in nearest if i % 2 == 0) if len(nearest) > 1 else nearest[0]
        assert rounded == math.copysign(formats.FLOAT4[code], value), value


@pytest.mark.parametrize("power", [-140, -127, -126, -20, 0, 60, 125, 127])
def test_mxfp4_keeps_what_it_can_say_at_any_magnitude(power: int) -> None:
    signed = torch.tensor(formats.FLOAT4 * 2) * torch.tensor([1.0] * 8 + [-1.0] * 8)
    values = torch.ldexp(signed.double().repeat(4), torch.tensor(power - 2)).float().view(32, 2)
    parts = Mxfp4().encode(values)
    got = Mxfp4().decode(*parts, torch.float32)
    if power >= -125:
        assert torch.equal(got, values)
    else:  # below the smallest scale: to the nearest of its steps, 2 ** -128
        assert float((got.double() - values.double()).abs().max()) <= 2.0**-129


def test_mxfp4_of_nothing_but_zeros() -> None:
    assert Mxfp4().decode(*Mxfp4().encode(torch.zeros(32, 3)), torch.float32).eq(0).all()


@pytest.mark.parametrize(
    ("weights", "scales"),
    [
        ((4, 2, 16), (4, 3)),
        ((4, 2, 16), (2, 4)),
        ((4, 2, 16), (4, 2, 1)),
        ((4, 2, 8), (4, 2)),
        ((2, 16), (2,)),
        ((8, 4, 2, 16), (4, 2)),
        ((), ()),
    ],
)
def test_mxfp4_parts_that_do_not_belong_together(weights, scales) -> None:
    assert Mxfp4().shape(weights, scales) is None


# --- FP8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_under_scales_of_every_kind(dtype: torch.dtype) -> None:
    codes = CODES.view(16, 16).view(torch.float8_e4m3fn)
    exponents = torch.tensor([0, 1, 118, 119, 127, 128, 240, 254, 255], dtype=torch.uint8)
    kinds = [
        torch.tensor([1e-38, 1.0, 3.7, 0.00123, 3e38]),
        torch.tensor([0.01171875, 2.0], dtype=torch.bfloat16),
        torch.tensor([0.33, 4.0], dtype=torch.float16),
        exponents,
        exponents.view(torch.float8_e8m0fnu),
    ]
    for scales in kinds:
        for index in range(len(scales)):
            scale = scales[index : index + 1].view(1, 1)
            got = Float8((16, 16)).decode(codes, scale, dtype)
            plain = torch.tensor([[quantised.e4m3(code)] for code in range(256)])
            factor = quantised.e8m0(int(scale)) if scale.dtype == torch.uint8 else None
            factor = scale_values(scale).item() if factor is None else factor
            expected = (plain * torch.tensor(factor)).view(16, 16).to(dtype)
            assert same(got, expected), (scales.dtype, index)


@STEADY
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)) | st.none(),
    scratch=st.sampled_from([1, 50, 1 << 17]),
)
def test_fp8_of_any_shape(rows, columns, block, scratch) -> None:
    """Sizes that are no multiples of the block, and cut anywhere."""
    down, across = (-(-rows // block[0]), -(-columns // block[1])) if block else (1, 1)
    scales = torch.rand(down, across, generator=torch.Generator().manual_seed(rows)) + 0.01
    codes = random_codes(rows, columns, seed=columns).view(torch.float8_e4m3fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "SCRATCH_VALUES", scratch)
        got = Float8(block).decode(codes, scales, torch.float32)
    assert same(got, quantised.fp8_by_hand(codes, scales, block))
    assert Float8(block).shape(codes.shape, scales.shape) == got.shape == (rows, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (64, 32), None], ids=str)
def test_fp8_is_what_transformers_makes_of_it(block, dtype: torch.dtype) -> None:
    """Where sizes are multiples of the block, without which transformers takes another block."""
    codes = random_codes(256, 384).view(torch.float8_e4m3fn)
    down, across = (256 // block[0], 384 // block[1]) if block else (1, 1)
    scales = torch.rand(down, across, generator=torch.Generator().manual_seed(1)) / 100
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
    assert same(Float8(block).decode(codes, scales, dtype), expected)


@STEADY
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    block=st.tuples(st.integers(1, 16), st.integers(1, 16)) | st.none(),
)
def test_fp8_rounds_to_the_nearest(rows, columns, block) -> None:
    generator = torch.Generator().manual_seed(rows * 31 + columns)
    values = torch.randn(rows, columns, generator=generator)
    weights, scales = Float8(block).encode(values)
    assert Float8(block).shape(weights.shape, scales.shape) == (rows, columns)
    got = Float8(block).decode(weights, scales, torch.float32)
    height, width = block or (rows, columns)
    grid = scales.reshape(-(-rows // height), -1)
    spread = grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    # Half a step: four bits of precision, or a step of 2 ** -9 near zero.
    step = torch.maximum(values.abs() / 16, spread * 2.0**-10)
    assert ((got - values).abs() <= step * 1.0001).all()
    # The largest of a block uses the whole range.
    assert weights.float().abs().max() == 448


def test_fp8_of_nothing_but_zeros() -> None:
    weights, scales = Float8((2, 2)).encode(torch.zeros(3, 3))
    assert scales.eq(1).all()
    assert Float8((2, 2)).decode(weights, scales, torch.bfloat16).eq(0).all()


@pytest.mark.parametrize(
    ("weights", "scales", "fits"),
    [
        ((300, 200), (3, 2), True),
        ((300, 200), (2, 2), False),
        ((300, 200), (2, 3), False),
        ((300, 200), (1, 1), True),
        ((300, 200), (1,), True),
        ((300, 200), (), True),
        ((300, 200), (6,), False),
        ((300, 200), (300, 1), False),
        ((4, 300, 200), (4, 3, 2), True),
        ((4, 300, 200), (4, 1, 1), True),
        ((4, 300, 200), (3, 2), False),
        ((4, 300, 200), (), False),
        ((300,), (3,), False),
    ],
)
def test_fp8_parts_that_belong_together(weights, scales, fits) -> None:
    assert Float8((128, 128)).shape(weights, scales) == (weights if fits else None)


def test_fp8_without_blocks_has_one_scale() -> None:
    assert Float8(None).shape((300, 200), (3, 2)) is None


# --- both


def test_powers_of_two() -> None:
    values = e8m0_values(CODES)
    assert values[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert values[255].isnan()


@pytest.mark.parametrize("format", [Mxfp4(), Float8((16, 16)), Float8(None)], ids=str)
def test_what_was_decoded_encodes_to_itself(format) -> None:
    values = torch.randn(96, 80, generator=torch.Generator().manual_seed(3))
    once = Packed(format, *format.encode(values)).decode(torch.float32)
    twice = Packed(format, *format.encode(once)).decode(torch.float32)
    assert torch.equal(once, twice)
    assert (once - values).abs().max() < values.abs().max() / 4
