"""Records of three precisions: what they stand for, and that shorter ones are prefixes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from disk import STEADY
from kernels import ISAS, TYPES
from retinue.memory.formats import Mxfp4
from retinue.memory.grouped import Grouped
from retinue.memory.layout import ExpertLayout, Window
from retinue.memory.nested import GROUP, PLANES, PULL, decode, decode_groups, encode, form_of

Shapes = dict[str, tuple[int, ...]]


def layout_of(shapes: Shapes, dtype: torch.dtype, gap: int = 0) -> ExpertLayout:
    """An expert whose parameters lie one after the other, `gap` bytes apart."""
    place, windows = 0, {}
    for name, shape in shapes.items():
        windows[name] = (Window(place, dtype, shape),)
        place += -(-torch.Size(shape).numel() * dtype.itemsize // 64) * 64 + gap
    return ExpertLayout((), (), windows, place, -(-place // 4096) * 4096)


def filled(layout: ExpertLayout, seed: int = 0) -> dict:
    views = layout.views(torch.zeros(layout.slot_bytes, dtype=torch.uint8))
    random = torch.Generator().manual_seed(seed)
    for (block,) in views.values():
        block.copy_(torch.randn(block.shape, generator=random))
    return views


def truth(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """What `bits` bits of weights [n] stand for, one weight at a time, in fp64."""
    found = []
    for start in range(0, len(weights), GROUP):
        group = weights[start : start + GROUP].double()
        scale = float(group.abs().max().float().bfloat16())
        for value in group.tolist():
            code = min(max(int(np.floor(value / scale * 128)) + 128, 0), 255) if scale else 128
            middle = ((code >> 8 - bits) + 0.5) / (1 << bits - 1) - 1
            found.append(middle * scale * (PULL if bits == 2 else 1))
    return torch.tensor(found, dtype=torch.float64)


@STEADY
@given(
    st.sampled_from(TYPES),
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([1.0, 1e-3, 300.0]),
    st.integers(0, 2**31),
)
def test_bits_stand_for_the_middle_of_their_interval(
    dtype: torch.dtype, rows: int, columns: int, size: float, seed: int
) -> None:
    layout = layout_of({"up": (rows, columns), "bias": (columns,)}, dtype)
    views = filled(layout, seed)
    views["up"][0].mul_(size)
    views["up"][0][0, :] = 0
    form = form_of(layout)
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    encode(form, views, record)
    for bits in (2, 4, 8):
        there = layout.views(torch.zeros(layout.slot_bytes, dtype=torch.uint8))
        decode(form, record[: form.prefix_bytes(bits)].clone(), bits, there)
        wanted = truth(views["up"][0].reshape(-1).float(), bits)
        found = there["up"][0].reshape(-1)
        # fp16 alone has numbers so small that a scale is rounded.
        close = {"rtol": 2e-3, "atol": 1e-7} if dtype is torch.float16 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found, wanted.to(dtype), **close)
        assert torch.equal(there["bias"][0], views["bias"][0]), "a bias stays as it is"


def test_each_plane_makes_it_better() -> None:
    layout = layout_of({"up": (64, 96)}, torch.bfloat16)
    views, form = filled(layout), form_of(layout)
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    encode(form, views, record)
    errors = {}
    for bits in (2, 4, 8):
        there = layout.views(torch.zeros(layout.slot_bytes, dtype=torch.uint8))
        decode(form, record, bits, there)
        lost = (there["up"][0].float() - views["up"][0].float()).square().sum()
        errors[bits] = float(lost / views["up"][0].float().square().sum())
    assert 0.10 < errors[2] < 0.14
    assert 0.006 < errors[4] < 0.009
    assert errors[8] < 5e-5


def test_sizes() -> None:
    """64 x 96 weights: 192 groups, 384 bytes of scales, and 2, 4 and 8 bits a weight."""
    form = form_of(layout_of({"up": (64, 96)}, torch.bfloat16))
    assert (form.groups, form.head_bytes, form.rest_bytes) == (192, 384, 0)
    assert [form.used_bytes(bits) for bits in (2, 4, 8)] == [384 + 6144 * b // 8 for b in (2, 4, 8)]
    assert [form.prefix_bytes(bits) for bits in (2, 4, 8)] == [4096, 4096, 8192]
    assert form.record_bytes == 8192


def test_parameters_that_are_seen_transposed_or_in_pieces() -> None:
    base = torch.randn(40, 48).bfloat16()
    layout = layout_of({"up": (48, 40)}, torch.bfloat16)
    form = form_of(layout)
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    encode(form, {"up": (base.T,)}, record)
    other = torch.empty(form.record_bytes, dtype=torch.uint8)
    encode(form, {"up": (base.T.contiguous(),)}, other)
    assert torch.equal(record, other)
    target = torch.zeros(40, 48, dtype=torch.bfloat16)
    decode(form, record, 8, {"up": (target.T,)})
    assert float((target - base).abs().max()) < 0.05


@pytest.mark.parametrize(
    "window",
    [
        Window(0, torch.uint8, (4, 2, 16), format=Mxfp4(), scales=Window(128, torch.uint8, (4, 2))),
        Window(
            0,
            torch.uint8,
            Grouped(8, 16, 32).weights_shape,
            format=Grouped(8, 16, 32),
            scales=Window(512, torch.bfloat16, (1, 1, 16)),
        ),
    ],
)
def test_what_is_quantised_already_is_not_nested(window: Window) -> None:
    assert form_of(ExpertLayout((), (), {"up": (window,)}, 0, 4096)) is None


def test_a_damaged_weight_stays_one_weight() -> None:
    layout = layout_of({"up": (1, 64)}, torch.float32)
    views, form = filled(layout), form_of(layout)
    views["up"][0][0, 40] = torch.nan
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    encode(form, views, record)
    there = layout.views(torch.zeros(layout.slot_bytes, dtype=torch.uint8))
    decode(form, record, 8, there)
    assert there["up"][0][0, :32].isfinite().all()
    assert not there["up"][0][0, 40].isfinite(), "and is still seen to be damaged"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_the_library_decodes_to_the_same_bits(isa: str, planes: int, dtype: torch.dtype) -> None:
    """Of all scales that there are, and of as many groups as do not fill a block."""
    native, bits = kernels.kernels(isa), sum(PLANES[:planes])
    random = torch.Generator().manual_seed(planes)
    scales = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    scales = scales[scales.isfinite()][:: 1 if bits == 8 else 37].contiguous()
    groups = len(scales)
    given = [
        torch.randint(0, 256, (groups * GROUP * width // 8,), generator=random, dtype=torch.uint8)
        for width in PLANES[:planes]
    ]
    found, wanted = (torch.zeros(groups * GROUP, dtype=dtype) for _ in range(2))
    native.unnest(scales, given, bits, found)
    decode_groups(given, scales, wanted)
    assert torch.equal(found, wanted)


def test_the_library_refuses_what_does_not_fit() -> None:
    native = kernels.every()[0]
    scales, out = torch.ones(3, dtype=torch.bfloat16), torch.zeros(96)
    first = torch.zeros(24, dtype=torch.uint8)
    for wrong in ([first[:23]], [first.short()], [first, first]):
        with pytest.raises(ValueError, match=r"plane|zip"):
            native.unnest(scales, wrong, 2, out)
    for wrong_scales, wrong_out in ((scales.float(), out), (scales, out[:95])):
        with pytest.raises(ValueError, match=r"scales|out"):
            native.unnest(wrong_scales, [first], 2, wrong_out)
