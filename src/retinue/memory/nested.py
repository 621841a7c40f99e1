"""One record for an expert in three precisions: int2, int4 and int8 are prefixes of it.

After D2MoE's matryoshka quantisation (arXiv 2504.15299, section 4.1), where a wider weight is the
narrower one and further planes. 32 weights in a row have one bf16 scale, their largest magnitude;
a weight's eight bits say which 256th of [-scale, scale] it lies in, and stand for its middle. The
first plane has the upper two bits of all weights, the second the next two, the third the lower
four: what has not been read leaves a wider interval, of which the middle counts. Deviations: the
paper's planes are one bit each, with scales of their own and error compensation by calibration;
here they share a scale, so that nothing has to be calibrated; see docs/LOG.md for the errors.

A record is scales and what stays as it is (biases), plane, plane, plane. What is decoded is the
nearest number of the parameter's own type to what the bits stand for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from retinue.memory.files import ALIGNMENT
from retinue.memory.formats import Packed
from retinue.memory.layout import Block, ExpertLayout
from retinue.memory.native import library

GROUP = 32
PRECISIONS = {"int8": 8, "int4": 4, "int2": 2}
PLANES = (2, 2, 4)  # bits of each
PULL = 15 / 16  # of the middles of int2: within wide intervals more weights lie nearer to zero
ENCODED_GROUPS = 1 << 14  # at a time: what bounds the scratch
SCRATCH_GROUPS = 1 << 12  # decoded at a time: what stays in a core's cache

Views = Mapping[str, tuple[Block, ...]]
_LOOKUPS = {
    torch.bfloat16: (torch.int64, torch.int32),
    torch.float16: (torch.int64, torch.int32),
    torch.float32: (torch.complex128, torch.int64),
}  # one element as long as four weights, and as two


@dataclass(frozen=True, slots=True)
class _Part:
    """A block of a parameter: where its groups begin, or its bytes if it stays as it is."""

    parameter: str
    block: int
    count: int  # of weights
    groups: int  # 0: it stays as it is
    start: int  # first group, or first byte after the scales
    size: int  # bytes, of what stays


@dataclass(frozen=True, slots=True)
class NestedForm:
    """Where everything lies in the record of one expert. Bytes; `of` makes it."""

    parts: tuple[_Part, ...]
    groups: int
    rest_bytes: int

    @property
    def head_bytes(self) -> int:
        """Scales and what stays as it is."""
        return _up(2 * self.groups + self.rest_bytes, 64)

    @property
    def record_bytes(self) -> int:
        """A whole record, aligned."""
        return self.prefix_bytes(8)

    def prefix_bytes(self, bits: int) -> int:
        """What has to be read for 8, 4 or 2 bits a weight, aligned."""
        return _up(self.head_bytes + self.groups * GROUP * bits // 8, ALIGNMENT)

    def used_bytes(self, bits: int) -> int:
        """Of these, those of weights and scales."""
        return 2 * self.groups + self.rest_bytes + self.groups * GROUP * bits // 8


def form_of(layout: ExpertLayout) -> NestedForm | None:
    """How an expert is nested; None where its weights are stored in other than plain numbers."""
    parts, groups, rest = list[_Part](), 0, 0
    for name, windows in sorted(layout.windows.items()):
        for index, window in enumerate(windows):
            if layout.plain is not None or window.format is not None:
                return None
            count = torch.Size(window.shape).numel()
            if len(window.shape) > 1 and window.dtype in _LOOKUPS:
                parts.append(_Part(name, index, count, -(-count // GROUP), groups, 0))
                groups += parts[-1].groups
            else:
                size = count * window.dtype.itemsize
                parts.append(_Part(name, index, count, 0, rest, size))
                rest = _up(rest + size, 16)
    return NestedForm(tuple(parts), groups, rest)


def encode(form: NestedForm, views: Views, record: torch.Tensor) -> None:
    """Write the record of an expert that is seen as `views`: uint8 [record_bytes]."""
    record.zero_()
    scales = record[: 2 * form.groups].view(torch.bfloat16)
    for part in form.parts:
        block = _plain(views, part)
        if not part.groups:
            start = 2 * form.groups + part.start
            record[start : start + part.size] = block.contiguous().view(-1).view(torch.uint8)
            continue
        own = scales[part.start : part.start + part.groups]
        _encode_groups(block.reshape(-1), own, _planes(form, part, record))


def _encode_groups(block: torch.Tensor, scales: torch.Tensor, planes: list[torch.Tensor]) -> None:
    """block: [weights], as many groups as `scales` has, the last one perhaps not full."""
    for start in range(0, len(scales), ENCODED_GROUPS):
        stop = min(start + ENCODED_GROUPS, len(scales))
        given = block[start * GROUP : stop * GROUP]
        flat = torch.zeros((stop - start) * GROUP)
        flat[: len(given)] = given
        values = flat.view(-1, GROUP)
        largest = values.abs().amax(1, keepdim=True).bfloat16()
        scales[start:stop] = largest[:, 0]
        codes = (values / largest.float()).nan_to_num_(0.0, 1.0, -1.0)
        codes = codes.mul_(128).floor_().add_(128).clamp_(0, 255).to(torch.uint8)
        left = 8
        for plane, width in zip(planes, PLANES, strict=True):
            left -= width
            field = (codes >> left & (1 << width) - 1).view(-1, 8 // width)
            shifts = torch.arange(0, 8, width, dtype=torch.uint8)
            each = GROUP * width // 8
            plane[start * each : stop * each] = (field << shifts).sum(1, dtype=torch.uint8)


def decode(form: NestedForm, record: torch.Tensor, bits: int, views: Views) -> None:
    """Write what the first `bits` bits of each weight stand for to `views`.

    record: uint8, at least the prefix of `bits`.
    """
    scales = record[: 2 * form.groups].view(torch.bfloat16)
    for part in form.parts:
        block = _plain(views, part)
        if not part.groups:
            start = 2 * form.groups + part.start
            stored = record[start : start + part.size].clone()  # it may lie at an odd address
            block.copy_(stored.view(block.dtype).view(block.shape))
            continue
        whole = part.count == part.groups * GROUP and block.is_contiguous()
        out = block.view(-1) if whole else torch.empty(part.groups * GROUP, dtype=block.dtype)
        own = scales[part.start : part.start + part.groups]
        planes, native = _planes(form, part, record, bits), library()
        if native is not None:
            native.unnest(own, planes, bits, out)
        else:
            decode_groups(planes, own, out)
        if not whole:
            block.copy_(out[: part.count].view(block.shape))


def decode_groups(planes: list[torch.Tensor], scales: torch.Tensor, out: torch.Tensor) -> None:
    """What the native library does, without it: out [groups * 32].

    Sums of the planes' values are exact; the product is rounded once.
    """
    quarters, halves = _LOOKUPS[out.dtype]
    tables = _tables(out.dtype, len(planes))
    for start in range(0, len(scales), SCRATCH_GROUPS):
        stop = min(start + SCRATCH_GROUPS, len(scales))
        into = out[start * GROUP : stop * GROUP]
        for number, plane in enumerate(planes):
            lookup, each = (quarters, 8) if PLANES[number] == 2 else (halves, 16)
            index = plane[start * each : stop * each].to(torch.int32)
            found = tables[number].view(lookup).index_select(0, index).view(out.dtype)
            into.copy_(found) if number == 0 else into.add_(found)
        into.view(-1, GROUP).mul_(scales[start:stop].to(out.dtype).unsqueeze(1))


def _planes(
    form: NestedForm, part: _Part, record: torch.Tensor, bits: int = 8
) -> list[torch.Tensor]:
    """The part's bytes of each plane that `bits` take."""
    found, start, left = [], form.head_bytes, bits
    for width in PLANES:
        if left <= 0:
            break
        each = GROUP * width // 8
        first = start + part.start * each
        found.append(record[first : first + part.groups * each])
        start, left = start + form.groups * each, left - width
    return found


@cache
def _tables(dtype: torch.dtype, planes: int) -> tuple[torch.Tensor, ...]:
    """By plane, what each byte's weights add: [256 * weights a byte] in `dtype`.

    In units of the scale. The last plane that is read adds the middle of what it leaves open.
    """
    tables, bits = [], 0
    for number, width in enumerate(PLANES[:planes]):
        bits += width
        field = torch.arange(1 << width, dtype=torch.float64)
        if number == 0:
            field = field - (1 << width - 1)
        if number == planes - 1:
            field = field + 0.5
        value = field / (1 << bits - 1) * (PULL if planes == 1 else 1)
        byte = torch.arange(256)
        each = [value[byte >> shift & (1 << width) - 1] for shift in range(0, 8, width)]
        tables.append(torch.stack(each, dim=1).to(dtype).view(-1))
    return tuple(tables)


def _plain(views: Views, part: _Part) -> torch.Tensor:
    block = views[part.parameter][part.block]
    assert not isinstance(block, Packed)
    return block


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
