"""int8 and int4 in groups: the bytes that the kernels read, sizes, and how near the numbers are."""

import pytest
import torch

from retinue.memory import native
from retinue.memory.grouped import GROUP, LANES, Grouped, encode, grouped

SHAPES = [(16, 32), (17, 33), (5, 7), (1, 1), (48, 64), (33, 31), (100, 200)]
BITS = (4, 8)
# Relative L2 errors of normal numbers: measured 0.081 and 0.0054.
WORST = {4: 0.095, 8: 0.0065}


def values(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randn(rows, columns, generator=random).to(dtype)


def by_hand(form: Grouped, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers, one after the other, as native/retinue.h describes the bytes."""
    rows = []
    for row in range(form.rows):
        tile, lane = divmod(row, 16)
        numbers = []
        for column in range(form.columns):
            group, place = divmod(column, 32)
            if form.bits == 8:
                code = int(codes[tile, group, place // 4, lane, place % 4]) - 128
            else:
                byte = int(codes[tile, group, place // 8, lane, place % 4])
                code = (byte >> 4 if place % 8 >= 4 else byte % 16) - 8
            numbers.append(code * float(scales[tile, group, lane]))
        rows.append(numbers)
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_header(bits: int, shape: tuple[int, int]) -> None:
    form = Grouped(bits, *shape)
    codes, scales = form.encode(values(*shape))
    assert (codes.shape, scales.shape) == (form.weights_shape, form.scales_shape)
    assert codes.numel() + 2 * scales.numel() == form.stored_bytes
    assert form.shape(tuple(codes.shape), tuple(scales.shape)) == shape
    decoded = form.decode(codes, scales, torch.float32)
    assert torch.equal(decoded, by_hand(form, codes, scales))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(form.decode(codes, scales, dtype), decoded.to(dtype))


@pytest.mark.parametrize("bits", BITS)
def test_bits_a_weight(bits: int) -> None:
    assert Grouped(bits, 1024, 2048).stored_bytes * 8 == (bits + 0.5) * 1024 * 2048


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_small(bits: int, dtype: torch.dtype) -> None:
    given = values(100, 200, dtype)
    form = Grouped(bits, 100, 200)
    decoded = form.decode(*form.encode(given), torch.float32)
    assert (decoded - given.float()).norm() <= WORST[bits] * given.float().norm()


@pytest.mark.parametrize("bits", BITS)
def test_bands_change_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, form = values(100, 200), Grouped(bits, 100, 200)
    codes, scales = form.encode(given)
    decoded = form.decode(codes, scales, torch.float32)
    monkeypatch.setattr("retinue.memory.grouped.BLOCK_VALUES", LANES * GROUP)
    assert len(list(form.bands())) == 7
    again = form.encode(given)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    assert torch.equal(form.decode(codes, scales, torch.float32), decoded)


@pytest.mark.parametrize("bits", BITS)
def test_what_a_format_can_say_comes_back(bits: int) -> None:
    """Zeros, and whole multiples of a power of two."""
    form = Grouped(bits, 16, 96)
    given = torch.zeros(16, 96)
    given[:, 32:64] = 8 / 16 if bits == 4 else 127 / 16
    given[:, 64:] = torch.randint(-7, 8, (16, 32)) / 64
    given[:, 64] = -8 / 64 if bits == 4 else -127 / 64
    assert torch.equal(form.decode(*form.encode(given), torch.float32), given)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_still_none(bits: int, bad: float) -> None:
    given, form = values(16, 64), Grouped(bits, 16, 64)
    given[3, 40] = bad
    decoded = form.decode(*form.encode(given), torch.float32)
    assert not decoded[3, 32:].isfinite().all()
    decoded[3, 32:] = given[3, 32:] = 0
    assert torch.allclose(decoded, given, atol=0.4)


def test_the_transposed() -> None:
    given = values(64, 48)
    form = grouped("int8", 48, 64, transposed=True)
    codes, scales = form.encode(given)
    assert form.shape(tuple(codes.shape), tuple(scales.shape)) == (64, 48)
    assert torch.allclose(form.decode(codes, scales, torch.float32), given, atol=0.02)


def test_tensors_of_another_matrix_are_none_of_it() -> None:
    form = Grouped(4, 17, 33)
    assert form.shape((1, 2, 4, 16, 4), form.scales_shape) is None
    assert form.shape(form.weights_shape, (2, 2, 8)) is None


@pytest.mark.skipif(native.library() is None, reason="there are no kernels")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_encode_as_well(bits: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Not to the same bits: of two codes that are equally near either may be taken."""
    form, given = Grouped(bits, *shape), values(*shape, dtype)
    codes = torch.empty(form.weights_shape, dtype=torch.uint8)
    scales = torch.empty(form.scales_shape, dtype=torch.bfloat16)
    encode(form, given.T.contiguous().T, codes, scales)  # whatever way it lies
    errors = [
        (form.decode(*each, torch.float32) - given.float()).norm()
        for each in ((codes, scales), form.encode(given))
    ]
    assert errors[0] <= 1.02 * errors[1] + 1e-6
