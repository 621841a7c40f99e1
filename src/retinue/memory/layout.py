"""Where the parts of one expert lie: in the files, and within a slot of memory.

A *piece* is a run of checkpoint bytes that becomes (a block of rows of) one parameter of the
expert. Pieces that touch in the file are read as one *extent*. Direct reads start and end at
multiples of `ALIGNMENT`, so an extent takes its aligned window in the slot and its pieces start a
few bytes into it: reading needs no copy, and the same expert looks the same in every slot. What a
quantised checkpoint stores as weights and scales is a piece with a second one, and stays as it is.
"""

from dataclasses import dataclass
from math import prod

import torch

from retinue.memory.base import Extent
from retinue.memory.checkpoint import TensorEntry
from retinue.memory.files import ALIGNMENT
from retinue.memory.formats import Format, Packed

MAX_GAP_BYTES = 64 << 10  # reading over a gap this small is cheaper than a second read

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# And what formats consist of.
STORED_DTYPES = TORCH_DTYPES | {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}

Block = torch.Tensor | Packed  # what `views` shows of rows of a parameter


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of one parameter of an expert: `[start, stop)` of `entry`'s file, of `shape`.

    Without `strides`, in elements, the block is rows of the parameter that lie one after the other.
    With a `format` it is the weights of such a block, and `scales` are its scales.
    """

    parameter: str
    entry: TensorEntry
    start: int
    stop: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    format: Format | None = None
    scales: "Piece | None" = None

    @property
    def weight_bytes(self) -> int:
        """Bytes that belong to the block; what lies between its elements does not."""
        return prod(self.shape) * self.entry.item_bytes


@dataclass(frozen=True, slots=True)
class Window:
    """A typed view into a slot from byte `offset` on, of `shape`; contiguous without `strides`.

    With a `format` it shows the weights, and `scales` the scales.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    format: Format | None = None
    scales: "Window | None" = None


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How one expert is read and seen: `windows[parameter]` are the blocks of its rows in order.

    With `plain`, that is what the files hold: `extents` are its reads, into memory of their own,
    and the slot gets what it is encoded to. With a checksum the one piece is the whole slot.
    """

    pieces: tuple[Piece, ...]
    extents: tuple[Extent, ...]
    windows: dict[str, tuple[Window, ...]]
    weight_bytes: int
    slot_bytes: int
    plain: "ExpertLayout | None" = None
    checksum: int | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes that a read of this expert moves from the disk."""
        return sum(extent.stop - extent.start for extent in self.extents)

    @property
    def used_bytes(self) -> int:
        """Of these, those of weights."""
        return self.weight_bytes if self.plain is None else self.plain.weight_bytes

    def views(self, slot: torch.Tensor) -> dict[str, tuple[Block, ...]]:
        """The expert's parameters as they lie in `slot`, a uint8 tensor `[slot_bytes]`."""
        return {
            name: tuple(_view(slot, window) for window in windows)
            for name, windows in self.windows.items()
        }


def _view(slot: torch.Tensor, window: Window) -> Block:
    if window.format is not None and window.scales is not None:
        return Packed(window.format, _tensor(slot, window), _tensor(slot, window.scales))
    return _tensor(slot, window)


def _tensor(slot: torch.Tensor, window: Window) -> torch.Tensor:
    if window.strides is not None:
        last = sum(
            (size - 1) * step for size, step in zip(window.shape, window.strides, strict=True)
        )
        count = (last + 1) * window.dtype.itemsize
        elements = slot[window.offset : window.offset + count].view(window.dtype)
        return elements.as_strided(window.shape, window.strides)
    count = prod(window.shape) * window.dtype.itemsize
    return slot[window.offset : window.offset + count].view(window.dtype).view(window.shape)


def lay_out(pieces: list[Piece]) -> ExpertLayout:
    """Plan reads and views of the expert made of `pieces` (in the order of each one's rows)."""
    stored = [part for piece in pieces for part in (piece, piece.scales) if part is not None]
    extents: list[Extent] = []
    place: dict[int, int] = {}  # id of a stored piece -> its offset in the slot
    offset = 0
    for group in _groups(stored):
        extent = _extent(stored, group, offset)
        for index in group:
            place[id(stored[index])] = extent.offset + stored[index].start - extent.start
        extents.append(extent)
        offset = _up(extent.offset + extent.stop - extent.start)
    windows: dict[str, list[Window]] = {}
    for piece in pieces:
        _append(windows.setdefault(piece.parameter, []), _window(piece, place))
    weight_bytes = sum(piece.weight_bytes for piece in stored)
    frozen = {name: tuple(blocks) for name, blocks in windows.items()}
    return ExpertLayout(tuple(pieces), tuple(extents), frozen, weight_bytes, offset)


def _window(piece: Piece, place: dict[int, int]) -> Window:
    scales = None if piece.scales is None else _window(piece.scales, place)
    dtype = STORED_DTYPES[piece.entry.dtype]
    return Window(place[id(piece)], dtype, piece.shape, piece.strides, piece.format, scales)


def _groups(pieces: list[Piece]) -> list[list[int]]:
    """Indices of pieces that one read serves, in file order."""
    order = sorted(range(len(pieces)), key=lambda i: (str(pieces[i].entry.file), pieces[i].start))
    groups: list[list[int]] = []
    for index in order:
        piece = pieces[index]
        if groups and _joins([pieces[i] for i in groups[-1]], piece):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _joins(group: list[Piece], piece: Piece) -> bool:
    """Whether `piece` is read together with `group`, which starts before it.

    Blocks of every second row lie within each other's bytes.
    """
    first, stop = group[0], max(before.stop for before in group)
    near = piece.start - stop <= MAX_GAP_BYTES
    aligned = (piece.start - first.start) % piece.entry.item_bytes == 0
    return first.entry.file == piece.entry.file and near and aligned


def _extent(pieces: list[Piece], group: list[int], offset: int) -> Extent:
    first, last_stop = pieces[group[0]], max(pieces[index].stop for index in group)
    lead = first.start % ALIGNMENT
    if all(lead % pieces[index].entry.item_bytes == 0 for index in group):
        start, stop = first.start - lead, _up(last_stop)
        return Extent(first.entry.file, start, stop, last_stop, offset, direct=True)
    # An odd header length puts elements at odd addresses, where no tensor can lie. Such a file
    # is read without O_DIRECT, to an offset that is right for the elements.
    return Extent(first.entry.file, first.start, last_stop, last_stop, offset, direct=False)


def _append(blocks: list[Window], window: Window) -> None:
    """Add rows to a parameter; rows that touch the previous block in memory become part of it."""
    if blocks:
        last = blocks[-1]
        end = last.offset + last.dtype.itemsize * torch.Size(last.shape).numel()
        same = last.dtype == window.dtype and last.shape[1:] == window.shape[1:]
        same = same and last.strides is None and window.strides is None
        if same and window.format is None and end == window.offset:
            rows = last.shape[0] + window.shape[0]
            blocks[-1] = Window(last.offset, last.dtype, (rows, *last.shape[1:]))
            return
    blocks.append(window)


def _up(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
