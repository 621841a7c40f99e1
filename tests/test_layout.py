"""Plans of reads and views, tiers of slots, and random files read back through all of it."""

from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from disk import PATIENCE_S, STEADY, view_bytes, write_tensors
from retinue.memory.base import TicketState, Urgency
from retinue.memory.checkpoint import DTYPE_BYTES, TensorEntry, read_header
from retinue.memory.files import Reader
from retinue.memory.layout import ALIGNMENT, MAX_GAP_BYTES, ExpertLayout, Piece, lay_out
from retinue.memory.mover import Mover
from retinue.memory.tier import Tier


def piece(
    parameter: str, start: int, shape: tuple[int, ...], dtype: str = "BF16", file: str = "a"
) -> Piece:
    stop = start + prod(shape) * DTYPE_BYTES[dtype]
    entry = TensorEntry(f"{parameter}@{start}", Path(file), dtype, shape, start, stop)
    return Piece(parameter, entry, start, stop, shape)


def spans(layout: ExpertLayout) -> list[tuple[str, int, int]]:
    return [(str(extent.file), extent.start, extent.stop) for extent in layout.extents]


def check(layout: ExpertLayout) -> None:
    """What holds for every layout."""
    end = 0
    for extent in layout.extents:
        assert extent.offset >= end, "extents overlap in the slot"
        assert extent.offset % ALIGNMENT == 0
        assert extent.start < extent.needed_stop <= extent.stop
        if extent.direct:
            assert extent.start % ALIGNMENT == extent.stop % ALIGNMENT == 0
        end = extent.offset + extent.stop - extent.start
    assert end <= layout.slot_bytes
    assert layout.slot_bytes % ALIGNMENT == 0
    assert layout.read_bytes == sum(stop - start for _, start, stop in spans(layout))
    for windows in layout.windows.values():
        assert all(window.offset % window.dtype.itemsize == 0 for window in windows)


def test_adjacent_pieces_are_one_read() -> None:
    parts = [piece("gate_up", 5000, (64, 32)), piece("gate_up", 9096, (64, 32))]
    layout = lay_out([*parts, piece("down", 13192, (32, 64))])
    check(layout)
    assert spans(layout) == [("a", 4096, 20480)]
    assert layout.extents[0].needed_stop == 17288
    assert layout.extents[0].direct
    assert layout.weight_bytes == 3 * 4096
    assert layout.slot_bytes == layout.read_bytes == 16384
    assert [window.shape for window in layout.windows["gate_up"]] == [(128, 32)]


def test_rows_are_merged_in_the_order_of_the_pieces_only() -> None:
    gate, up = piece("gate_up", 0, (4, 8)), piece("gate_up", 64, (4, 8))
    assert [w.shape for w in lay_out([gate, up]).windows["gate_up"]] == [(8, 8)]
    swapped = lay_out([up, gate])  # up lies behind gate in the file, and comes first in the model
    assert [(w.offset, w.shape) for w in swapped.windows["gate_up"]] == [(64, (4, 8)), (0, (4, 8))]
    assert len(swapped.extents) == 1


@pytest.mark.parametrize("between", ["down", "other width", "other type"])
def test_rows_that_do_not_belong_together_stay_blocks(between: str) -> None:
    gate = piece("gate_up", 0, (4, 8))
    second = {
        "down": [piece("down", 64, (8, 4)), piece("gate_up", 128, (4, 8))],
        "other width": [piece("gate_up", 64, (8, 4))],
        "other type": [piece("gate_up", 64, (4, 8), "F16")],
    }[between]
    layout = lay_out([gate, *second])
    check(layout)
    assert len(layout.extents) == 1
    assert len(layout.windows["gate_up"]) == 2


def test_biases_are_merged_too() -> None:
    layout = lay_out([piece("bias", 0, (6,), "F32"), piece("bias", 24, (6,), "F32")])
    assert [window.shape for window in layout.windows["bias"]] == [(12,)]


def test_a_small_gap_is_read_over_and_a_large_one_is_not() -> None:
    first = piece("up", 0, (4, 8))
    near = lay_out([first, piece("down", 64 + MAX_GAP_BYTES, (4, 8))])
    far = lay_out([first, piece("down", 64 + MAX_GAP_BYTES + 2, (4, 8))])
    assert len(near.extents) == 1
    assert len(far.extents) == 2
    assert far.read_bytes == 2 * ALIGNMENT  # or 12288, were the second across a page border
    for layout in (near, far):
        check(layout)
        assert layout.weight_bytes == 128


def test_files_are_read_apart() -> None:
    layout = lay_out([piece("up", 0, (4, 8), file="b"), piece("down", 64, (4, 8), file="a")])
    check(layout)
    assert spans(layout) == [("a", 0, 4096), ("b", 0, 4096)]
    assert layout.slot_bytes == 8192


def test_pieces_that_share_bytes_are_read_once() -> None:
    layout = lay_out([piece("up", 0, (4, 8)), piece("down", 0, (4, 8))])
    check(layout)
    assert spans(layout) == [("a", 0, 4096)]


@pytest.mark.parametrize(
    ("dtype", "start", "direct"),
    [
        ("BF16", 4098, True),
        ("BF16", 4099, False),
        ("F16", 4097, False),
        ("F32", 4100, True),
        ("F32", 4098, False),
        ("F32", 4097, False),
    ],
)
def test_elements_at_odd_addresses_are_not_read_directly(
    dtype: str, start: int, direct: bool
) -> None:
    layout = lay_out([piece("up", start, (3, 5), dtype)])
    check(layout)
    assert layout.extents[0].direct is direct
    if not direct:
        assert (layout.extents[0].start, layout.extents[0].stop) == (start, layout.pieces[0].stop)


def test_pieces_at_different_odd_addresses_are_read_apart() -> None:
    layout = lay_out([piece("up", 4096, (3, 4), "F32"), piece("down", 4146, (3, 4), "F32")])
    check(layout)
    assert [extent.direct for extent in layout.extents] == [True, False]


# --- slots


def test_tier_hands_out_each_slot_once() -> None:
    tier = Tier(3, ALIGNMENT)
    taken = [tier.take() for _ in range(4)]
    assert sorted(slot for slot in taken if slot is not None) == [0, 1, 2]
    assert taken[3] is None
    assert tier.free == 0
    tier.give(1)
    assert tier.take() == 1
    tier.give(2)
    with pytest.raises(AssertionError):
        tier.give(2)


def test_slots_are_apart_and_aligned() -> None:
    tier = Tier(3, ALIGNMENT)
    for slot in range(3):
        tier.memory(slot)[:] = bytes([slot + 1]) * ALIGNMENT
    for slot in range(3):
        assert tier.tensor(slot).eq(slot + 1).all()
        assert tier.tensor(slot).data_ptr() % ALIGNMENT == 0
    assert len(tier.slab) == 3 * ALIGNMENT


def test_release_gives_the_pages_back() -> None:
    """What was in pages that the system took back is gone; kept pages would still show it."""
    tier = Tier(2, ALIGNMENT)
    tier.slab.fill_(7)
    tier.release()
    assert not tier.slab.any()


# --- through file, mover, tier and views


def read_back(layouts: list[ExpertLayout], *, direct: bool = True) -> list[dict[str, bytes]]:
    """What the views of each layout show after reading it in small chunks."""
    tier = Tier(len(layouts), max(layout.slot_bytes for layout in layouts))
    reader = Reader(direct=direct)
    mover = Mover(reader, readers=2, chunk_bytes=ALIGNMENT)
    try:
        slots = [tier.take() or 0 for _ in layouts]
        tickets = [
            mover.submit(layout.extents, tier.memory(slot), Urgency.DEMAND)
            for layout, slot in zip(layouts, slots, strict=True)
        ]
        assert mover.wait(lambda: all(ticket.settled for ticket in tickets), PATIENCE_S)
        assert [ticket.error for ticket in tickets] == [None] * len(tickets)
        assert {ticket.state for ticket in tickets} == {TicketState.DONE}
    finally:
        mover.close()
        reader.close()
    views = [layout.views(tier.tensor(slot)) for layout, slot in zip(layouts, slots, strict=True)]
    return [{name: view_bytes(blocks) for name, blocks in view.items()} for view in views]


def test_views_have_the_values_of_the_tensors(tmp_path: Path) -> None:
    gate, up = torch.randn(24, 50), torch.randn(24, 50)
    save_file({"gate": gate, "up": up}, tmp_path / "m")
    entries = {entry.name: entry for entry in read_header(tmp_path / "m")}
    pieces = [
        Piece("gate_up", e, e.start, e.stop, e.shape) for e in map(entries.get, ("up", "gate")) if e
    ]
    layout = lay_out(pieces)
    tier = Tier(1, layout.slot_bytes)
    reader = Reader()
    for extent in layout.extents:
        into = tier.memory(0)[extent.offset : extent.offset + extent.stop - extent.start]
        reader.read(extent.file, extent.start, into, direct=extent.direct)
    reader.close()
    blocks = layout.views(tier.tensor(0))["gate_up"]
    assert torch.equal(torch.cat(blocks), torch.cat([up, gate]))
    assert blocks[0].dtype == torch.float32


def test_fused_slices_of_one_tensor(tmp_path: Path) -> None:
    """All experts in one tensor `[experts, rows, columns]`, each read alone."""
    contents = write_tensors(tmp_path / "m", {"w": ("BF16", (5, 37, 24))}, pad=6)
    (entry,) = read_header(tmp_path / "m")
    stride = 37 * 24 * 2
    starts = [entry.start + index * stride for index in range(5)]
    layouts = [lay_out([Piece("w", entry, s, s + stride, (37, 24))]) for s in starts]
    expected = [contents["w"][index * stride : (index + 1) * stride] for index in range(5)]
    assert [views["w"] for views in read_back(layouts)] == expected


shapes = st.one_of(
    st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 40), st.integers(1, 60))
)
dtypes = st.sampled_from(("BF16", "F16", "F32"))
tensors = st.lists(st.tuples(dtypes, shapes, st.integers(0, 3)), min_size=1, max_size=6)


@STEADY
@given(
    tensors=tensors,
    pad=st.integers(0, 9),
    gaps=st.lists(st.integers(0, 5000), max_size=6),
    order=st.randoms(use_true_random=False),
    direct=st.booleans(),
)
def test_hand_made_files_come_back(tmp_path_factory, tensors, pad, gaps, order, direct) -> None:
    """Any types, odd addresses, gaps, and any assignment to parameters and to two files."""
    folder = tmp_path_factory.mktemp("m")
    named = {f"t{i}": (dtype, shape) for i, (dtype, shape, _) in enumerate(tensors)}
    half = len(named) // 2
    contents = write_tensors(folder / "1", dict(list(named.items())[half:]), pad=pad, gaps=gaps)
    contents |= write_tensors(folder / "2", dict(list(named.items())[:half]), gaps=gaps)
    entries = {e.name: e for file in ("1", "2") for e in read_header(folder / file)}
    names = list(named)
    order.shuffle(names)
    parameters = {name: f"p{tensors[int(name[1:])][2]}" for name in names}
    layout = lay_out(
        [Piece(parameters[n], e, e.start, e.stop, e.shape) for n in names if (e := entries[n])]
    )
    check(layout)
    expected: dict[str, bytes] = {}
    for name in names:
        parameter = parameters[name]
        expected[parameter] = expected.get(parameter, b"") + contents[name]
    assert read_back([layout], direct=direct) == [expected]


@STEADY
@given(tensors=tensors, experts=st.integers(1, 3))
def test_safetensors_files_come_back(tmp_path_factory, tensors, experts) -> None:
    file = tmp_path_factory.mktemp("m") / "model.safetensors"
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    generator = torch.Generator().manual_seed(1)
    state = {
        f"{index}.{number}": torch.randn(shape, generator=generator).to(kinds[dtype])
        for index in range(experts)
        for number, (dtype, shape, _) in enumerate(tensors)
    }
    save_file(state, file)
    entries = {entry.name: entry for entry in read_header(file)}
    layouts = []
    for index in range(experts):
        own = [entries[f"{index}.{number}"] for number in range(len(tensors))]
        layouts.append(lay_out([Piece(e.name, e, e.start, e.stop, e.shape) for e in own]))
    for views in read_back(layouts):
        for name, got in views.items():
            assert got == view_bytes([state[name]])


# --- the reader


def test_reader_stops_at_the_end_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x" * 5000)
    reader = Reader()
    slot = Tier(1, 2 * ALIGNMENT).memory(0)
    assert reader.read(file, 0, slot, direct=True) == 5000
    assert bytes(slot[:5001]) == b"x" * 5000 + b"\0"
    assert reader.read(file, 4096, slot[:4096], direct=True) == 904
    assert reader.read(file, 8192, slot, direct=False) == 0
    reader.close()


def test_reader_counts_a_read_that_comes_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(range(250)) * 4)
    import os

    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: real(fd, [into[0][:7]], at))
    reader, into = Reader(direct=False), bytearray(1000)
    assert reader.read(file, 0, memoryview(into), direct=True) == 1000
    assert bytes(into) == bytes(range(250)) * 4
    assert reader.note  # asked for direct reads, and says why there are none
    reader.close()
