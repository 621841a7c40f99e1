"""Experts in another precision than their files have: where the parts lie in a slot, and encoding.

The codes of all matrices come first, then their scales, then what stays as it is, such as biases.
So every tensor begins where kernels like it. The same bytes lie in the slots of a model that is
quantised while it is loaded, and in the files of a pack.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from retinue.memory.files import ALIGNMENT
from retinue.memory.formats import Format, Packed, Transposed
from retinue.memory.grouped import Grouped, encode, grouped_form
from retinue.memory.layout import Block, ExpertLayout, Window

Views = Mapping[str, tuple[Block, ...]]
Windows = dict[str, tuple[Window, ...]]

_REST_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Matrix:
    """A parameter that is encoded: its outputs in blocks one after the other.

    `transposed` says that the parameter is [in, out]; the blocks are [out, in] all the same.
    """

    blocks: tuple[Grouped, ...]
    transposed: bool

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of the blocks, as parts of the parameter."""
        return tuple(Transposed(block) if self.transposed else block for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where the parts of an expert lie in a slot."""

    windows: Windows
    weight_bytes: int
    slot_bytes: int


def arrange(plain: ExpertLayout, matrices: Mapping[str, Matrix]) -> Arrangement:
    """Slots for experts that look like `plain`, whose `matrices` are encoded."""
    place = 0
    codes: dict[str, list[int]] = {name: [] for name in matrices}
    scales: dict[str, list[int]] = {name: [] for name in matrices}
    for name, matrix in matrices.items():
        for block in matrix.blocks:
            codes[name].append(place)
            place += prod(block.weights_shape)
    for name, matrix in matrices.items():
        for block in matrix.blocks:
            scales[name].append(place)
            place += 2 * prod(block.scales_shape)
    weight_bytes, windows = place, Windows()
    for name, rest in plain.windows.items():
        if name in matrices:
            parts = zip(matrices[name].formats, matrices[name].blocks, strict=True)
            offsets = zip(codes[name], scales[name], strict=True)
            windows[name] = tuple(
                grouped_window(form, block, *at)
                for (form, block), at in zip(parts, offsets, strict=True)
            )
            continue
        kept = []
        for window in rest:
            place = -(-place // _REST_ALIGNMENT) * _REST_ALIGNMENT
            kept.append(Window(place, window.dtype, window.shape))
            count = prod(window.shape) * window.dtype.itemsize
            place, weight_bytes = place + count, weight_bytes + count
        windows[name] = tuple(kept)
    return Arrangement(windows, weight_bytes, -(-place // ALIGNMENT) * ALIGNMENT)


def grouped_window(form: Format, block: Grouped, codes: int, scales: int) -> Window:
    """The window of a block whose codes and scales lie at these offsets."""
    inner = Window(scales, torch.bfloat16, block.scales_shape)
    return Window(codes, torch.uint8, block.weights_shape, format=form, scales=inner)


def recoded(plain: ExpertLayout, arrangement: Arrangement) -> ExpertLayout:
    """An expert that is read as `plain` says and encoded into its slot."""
    return replace(
        plain,
        windows=arrangement.windows,
        weight_bytes=arrangement.weight_bytes,
        slot_bytes=arrangement.slot_bytes,
        plain=plain,
    )


def encode_expert(windows: Windows, views: Views, slot: torch.Tensor) -> None:
    """Write an expert's parameters, seen as its files hold them, to `slot` as `windows` say.

    slot: uint8 [slot_bytes]. What lies between the windows is left as it is.
    """
    targets = ExpertLayout((), (), windows, 0, 0).views(slot)
    for name, blocks in targets.items():
        if isinstance(blocks[0], torch.Tensor):
            for block, given in zip(blocks, views[name], strict=True):
                assert isinstance(block, torch.Tensor)
                assert isinstance(given, torch.Tensor)
                block.copy_(given)
        else:
            _encode_matrix(blocks, views[name])


def _encode_matrix(blocks: tuple[Block, ...], given: tuple[Block, ...]) -> None:
    for block, rows in pairs(blocks, given):
        encode(plain_format(block.format), rows, block.weights, block.scales)


def pairs(blocks: tuple[Block, ...], given: tuple[Block, ...]) -> list[tuple[Packed, torch.Tensor]]:
    """Each encoded block of a parameter with the outputs of `given` that it is of, [out, in]."""
    packed = [block for block in blocks if isinstance(block, Packed)]
    counts = [plain_format(block.format).rows for block in packed]
    transposed = isinstance(packed[0].format, Transposed)
    rows = [part.T if transposed else part for part in given if isinstance(part, torch.Tensor)]
    if [len(part) for part in rows] != counts:
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        rows = list(torch.split(whole, counts))
    return list(zip(packed, rows, strict=True))


def plain_format(form: Format) -> Grouped:
    """What `form` is beneath a transposition."""
    plain = grouped_form(form)
    assert plain is not None, form
    return plain
