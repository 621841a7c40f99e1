"""Linear layers, formats and their limits, for every set of instructions that this machine has."""

import math
from operator import attrgetter

import pytest
import torch

import kernels
from kernels import ISAS, TYPES, Weight, relative, seen
from retinue.memory.native import Format, Matrix, codes_bytes, matrix, scales_bytes

QUANTISED = (Format.INT8, Format.INT4)
name = attrgetter("name")
# Of results: half a step of the type, and something for the sums.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", Format, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_linear_is_the_product(isa: str, format: Format, dtype: torch.dtype) -> None:
    native = kernels.kernels(isa)
    torch.manual_seed(format)
    for seed, (rows, columns, tokens) in enumerate(kernels.sizes(format, 8)):
        weight = Weight(format, rows, columns, seed)
        x = torch.randn(tokens, columns + 3).to(dtype)[:, 1:-2]  # neither aligned nor contiguous
        bias = torch.randn(rows).to(dtype) if seed % 2 else None
        given = native.linear(weight.matrix, x, bias)
        truth = seen(format, x) @ weight.numbers.T
        if bias is not None:
            truth += bias.double()
        assert given.dtype == dtype
        assert relative(given, truth) < ROUNDING[dtype], (rows, columns, tokens)
        assert ROUNDING[torch.float32] < 1e-3  # what is promised of int8 and int4


@pytest.mark.parametrize("format", QUANTISED, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_quantised_tokens_cost_little(isa: str, format: Format) -> None:
    """Against a truth that leaves x as it is, less than two in a hundred."""
    native = kernels.kernels(isa)
    torch.manual_seed(3)
    weight = Weight(format, 300, 1024, seed=1)
    for tokens in (1, 7, 64, 512):
        x = torch.randn(tokens, 1024)
        assert relative(native.linear(weight.matrix, x), x.double() @ weight.numbers.T) < 2e-2


@pytest.mark.parametrize("format", QUANTISED, ids=name)
def test_all_instructions_give_the_same_bits(format: Format) -> None:
    first, *others = kernels.every()
    torch.manual_seed(4)
    weight = Weight(format, 70, 2100, seed=2)
    x = torch.randn(35, 2100)
    truth = first.linear(weight.matrix, x)
    for native in others:
        assert torch.equal(native.linear(weight.matrix, x), truth), native.features


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", Format, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_is_independent(isa: str, format: Format, dtype: torch.dtype) -> None:
    """Of the tokens beside it and of the threads: to the bit."""
    native = kernels.kernels(isa)
    torch.manual_seed(5)
    weight = Weight(format, 130, 2100, seed=3)
    x = torch.randn(40, 2100).to(dtype)
    # With bf16 a lone token is summed in another order: so it is given a companion.
    company = 2 if format is Format.BF16 else 1
    rows = (row.expand(company, -1).contiguous() for row in x.split(1))
    alone = torch.cat([native.linear(weight.matrix, row)[:1] for row in rows])
    for threads in (1, 2, 3):
        native.set_threads(threads, 10)
        for tokens in (2, 3, 11, 16, 17, 40):
            together = native.linear(weight.matrix, x[:tokens])
            assert torch.equal(together, alone[:tokens]), (threads, tokens)
    native.set_threads(1, 0)


@pytest.mark.parametrize("isa", ISAS)
def test_results_are_rounded_once(isa: str) -> None:
    """The sums are those of fp32, whatever the type: torch's own rounding of them."""
    native = kernels.kernels(isa)
    torch.manual_seed(6)
    weight = Weight(Format.INT4, 200, 96, seed=4)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(9, 96).to(dtype)
        sums = native.linear(weight.matrix, x.float())
        assert torch.equal(native.linear(weight.matrix, x), sums.to(dtype))
    tiny = torch.randn(9, 96) * 1e-6  # where fp16 has fewer bits
    sums = native.linear(weight.matrix, tiny.half().float())
    assert torch.equal(native.linear(weight.matrix, tiny.half()), sums.half())


@pytest.mark.parametrize("format", Format, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_zeros_and_what_is_no_number(isa: str, format: Format) -> None:
    native = kernels.kernels(isa)
    torch.manual_seed(7)
    weight = Weight(format, 40, 100, seed=5)
    bias = torch.randn(40)
    x = torch.randn(18, 100)
    clean = native.linear(weight.matrix, x, bias)
    for value in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        spoilt[0] = 0
        spoilt[3, 77] = value
        given = native.linear(weight.matrix, spoilt, bias)
        assert torch.equal(given[0], bias)
        assert not given[3].isfinite().any()
        assert torch.equal(given[4:], clean[4:])


@pytest.mark.parametrize("isa", ISAS)
def test_fp16_of_every_magnitude(isa: str) -> None:
    """Overflow, denormals and ties, through a matrix that changes nothing."""
    native = kernels.kernels(isa)
    identity = torch.eye(32).bfloat16()
    weight = matrix(Format.BF16, 32, 32, identity)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = every[every.isfinite()].view(-1, 32)
    assert torch.equal(native.linear(weight, x), x)
    bias = torch.full((32,), 3e-5).half()
    assert torch.equal(native.linear(weight, x, bias), (x.float() + bias.float()).half())


@pytest.mark.parametrize("format", QUANTISED, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_encoded_numbers_are_near(isa: str, format: Format) -> None:
    native = kernels.kernels(isa)
    torch.manual_seed(8)
    for rows, columns in ((1, 1), (16, 32), (37, 101)):
        for dtype in TYPES:
            x = torch.randn(rows, columns + 5).to(dtype)[:, :-5]
            held = native.encode(x, format)
            given = native.decode(matrix(format, rows, columns, *held))
            assert relative(given, x) < (0.01 if format is Format.INT8 else 0.1)
            stored = Weight(format, rows, columns, seed=0)
            stored.matrix.codes, stored.matrix.scales = (part.data_ptr() for part in held)
            assert torch.equal(native.decode(stored.matrix, dtype), given.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
def test_the_scale_of_int4_is_a_good_one(isa: str) -> None:
    """No scale of sixty that are tried one by one is more than a little better."""
    native = kernels.kernels(isa)
    torch.manual_seed(9)
    x = torch.randn(64, 32)
    given = native.decode(matrix(Format.INT4, 64, 32, *native.encode(x, Format.INT4)))
    errors = (given - x).square().sum(1)
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    tried = []
    for divisor in torch.arange(5.0, 11.0, 0.2).tolist():
        for sign in (-1, 1):
            scale = (largest / (sign * divisor)).bfloat16().float()
            tried.append(((x / scale).round().clamp(-8, 7) * scale - x).square().sum(1))
    best = torch.stack(tried).amin(0)
    assert errors.sum() < 1.01 * best.sum()
    assert (errors < 1.5 * best).all()


@pytest.mark.parametrize("format", QUANTISED, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_what_int_can_say_survives(isa: str, format: Format) -> None:
    """Zeros, and numbers that are codes times a scale; a group with a NaN is no number at all."""
    native = kernels.kernels(isa)
    most = 127 if format is Format.INT8 else 7
    x = torch.randint(-most, most + 1, (20, 64)).float()
    x[:, ::32] = -most if format is Format.INT8 else -8
    x[4] = 0
    x[5, 3], x[6, 4] = math.nan, math.inf
    given = native.decode(matrix(format, 20, 64, *native.encode(x, format)))
    plain = torch.tensor([row for row in range(20) if row not in (5, 6)])
    assert torch.equal(given[plain], x[plain])
    assert not given[5, 3].isfinite()
    assert not given[6, 4].isfinite()
    assert torch.equal(given[5:7, 32:], x[5:7, 32:])


def test_mistakes_are_refused() -> None:
    native = kernels.every()[0]
    weight = Weight(Format.INT8, 20, 40, seed=6)
    for x in (torch.zeros(2, 41), torch.zeros(40, 2).T, torch.zeros(2, 40, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"needed|neighbours"):
            native.linear(weight.matrix, x)
    with pytest.raises(ValueError, match="bias"):
        native.linear(weight.matrix, torch.zeros(2, 40), torch.zeros(19))
    with pytest.raises(ValueError, match="bytes"):
        matrix(Format.INT4, 20, 40, torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="refused"):
        native.linear(Matrix(None, None, Format.INT8, 20, 40, 0), torch.zeros(2, 40))
    assert codes_bytes(Format.INT4, 17, 33) == 2 * 2 * 256
    assert scales_bytes(Format.INT8, 17, 33) == 2 * 2 * 32
