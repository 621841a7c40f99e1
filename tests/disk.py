"""Hand-made checkpoint files, and a disk that a test holds, breaks and watches."""

import json
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings

from retinue.memory.cache import LOADING, ExpertCache
from retinue.memory.checkpoint import DTYPE_BYTES, TensorEntry
from retinue.memory.layout import ExpertLayout, Piece, lay_out
from retinue.memory.link import DiskLink, sizes_of
from retinue.memory.mover import Mover, Source
from retinue.memory.tier import Tier
from retinue.policy.base import View
from retinue.types import Demand, FloatArray, IntArray

# The same examples in every run: a failure is never news about something else than the change.
STEADY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
PATIENCE_S = 20.0  # far more than anything here takes, so that only a hang fails


# --- files


def entry_fields(dtype: str, shape: Iterable[int], begin: int, end: int) -> dict[str, Any]:
    """A tensor's entry as a header holds it."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_raw(file: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    """A file with any header (an object becomes JSON) and any claim about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    file.write_bytes(struct.pack("<Q", claimed) + text + body)
    return file


def write_tensors(
    file: Path,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    *,
    pad: int = 0,
    gaps: Iterable[int] = (),
) -> dict[str, bytes]:
    """Write `name: (dtype, shape)` with patterned bytes; returns them.

    `pad` spaces lengthen the header, `gaps[i]` bytes of rubbish lie before tensor i.
    """
    header: dict[str, Any] = {}
    contents: dict[str, bytes] = {}
    body, before = b"", iter(gaps)
    for name, (dtype, shape) in tensors.items():
        body += b"\xee" * next(before, 0)
        contents[name] = pattern(f"{file.name}:{name}", 0, prod(shape) * DTYPE_BYTES[dtype])
        header[name] = entry_fields(dtype, shape, len(body), len(body) + len(contents[name]))
        body += contents[name]
    write_raw(file, json.dumps(header).encode() + b" " * pad, body)
    return contents


def write_checkpoint(folder: Path, shards: dict[str, list[str]], **config: object) -> Path:
    """A folder with `shards` (file name -> names of small tensors), without an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"} | config))
    for file, names in shards.items():
        write_tensors(folder / file, dict.fromkeys(names, ("F32", (2, 3))))
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    """The index that says which tensor is in which file."""
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- a disk


def pattern(name: str, start: int, count: int) -> bytes:
    """`count` bytes at `start` of an endless file that never repeats itself."""
    first, last = start // 8, -(-(start + count) // 8)
    words = np.arange(first, last, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(zlib.crc32(name.encode()) * 0xBF58476D1CE4E5B9 % 2**64)
    return words.tobytes()[start - first * 8 : start - first * 8 + count]


class FakeDisk:
    """A Source of patterned files. `calls` are its reads in order, `(file name, offset)`.

    When `held`, reads wait for `allow`. A fault at `(file name, offset)` happens once: an
    exception is raised, a number is the count of bytes that are delivered.
    """

    def __init__(self, *, held: bool = False) -> None:
        self.calls: list[tuple[str, int]] = []
        self.faults: dict[tuple[str, int], BaseException | int] = {}
        self._permits: float = 0 if held else inf
        self._changed = threading.Condition()

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        with self._changed:
            self.calls.append((file.name, offset))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._permits > 0, PATIENCE_S), "never allowed"
            self._permits -= 1
            fault = self.faults.pop((file.name, offset), None)
        if isinstance(fault, BaseException):
            raise fault
        got = len(into) if fault is None else fault
        into[:got] = pattern(file.name, offset, got)
        return got

    def allow(self, count: float = inf) -> None:
        """Let `count` more reads through."""
        with self._changed:
            self._permits += count
            self._changed.notify_all()

    def await_calls(self, count: int) -> None:
        """Wait until `count` reads have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, PATIENCE_S), self.calls


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition()`, which must not take long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.0005)


# --- experts


def expert_piece(layer: int, index: int, size: int) -> Piece:
    """Expert `index` of a patterned file of its layer, 1,000 bytes into its page."""
    start = index * 16384 + 1000
    entry = TensorEntry(f"{layer}.{index}", Path(f"layer{layer}"), "F32", (), start, start + size)
    return Piece("w", entry, start, start + size, (size // 4,))


def expert_layouts(rows: Iterable[int], size: int = 6000) -> list[list[ExpertLayout]]:
    """`rows[layer]` experts per layer, of `size` bytes each."""
    return [
        [lay_out([expert_piece(layer, index, size)]) for index in range(count)]
        for layer, count in enumerate(rows)
    ]


def view_bytes(blocks: Iterable[torch.Tensor]) -> bytes:
    """The bytes that one parameter's views show."""
    return b"".join(
        block.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for block in blocks
    )


class ByNumber:
    """An evictor under which low layers and low experts leave first."""

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        return np.asarray(layers * 1000 + experts, dtype=np.float32)


class Rig:
    """A cache over a fake disk; `with Rig(...) as rig:` ends its threads."""

    def __init__(
        self,
        rows: tuple[int, ...],
        slots: int,
        *,
        top_k: int = 1,
        held: bool = False,
        source: Source | None = None,
    ) -> None:
        self.layouts = expert_layouts(rows)
        self.disk = FakeDisk(held=held)
        self.mover = Mover(source or self.disk, readers=2, chunk_bytes=4096)
        self.tier = Tier(slots, max(layout.slot_bytes for row in self.layouts for layout in row))
        self.link = DiskLink(self.layouts, self.tier, self.mover)
        sizes = sizes_of(self.layouts)
        self.cache = ExpertCache(sizes, self.tier, self.link, ByNumber(), top_k)

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_: object) -> None:
        self.disk.allow()
        self.mover.close()

    def begin(self, phase: Any, layer: int = 0) -> None:
        """Start a step at `layer`."""
        self.cache.begin_step(phase)
        self.cache.begin_layer(layer)

    def load(self, layer: int, *experts: int, keep: IntArray | None = None) -> list[int]:
        """Fetch, and wait for the reads; returns those that found no room."""
        left = self.cache.fetch(layer, ids(*experts), keep)
        self.settle()
        return left.tolist()

    def settle(self) -> None:
        """Wait until nothing is on its way."""
        while (self.cache.slot_of == LOADING).any():
            self.cache.wait(PATIENCE_S)

    def use(self, layer: int, *experts: int) -> None:
        """Say that one token used `experts`."""
        count = len(experts)
        ones = np.ones(count)
        demand = Demand(layer, ids(*experts), ones.astype(np.int64), ones.astype(np.float32))
        self.cache.touch(demand, tokens=1)

    def resident(self, layer: int) -> list[int]:
        """READY experts of `layer`."""
        return np.flatnonzero(self.cache.slot_of[layer] >= 0).tolist()

    def loading(self, layer: int) -> list[int]:
        """LOADING experts of `layer`."""
        return np.flatnonzero(self.cache.slot_of[layer] == LOADING).tolist()

    def is_right(self, layer: int, expert: int) -> bool:
        """Whether the READY expert's slot holds the bytes of that expert."""
        views = self.link.views(layer, expert, int(self.cache.slot_of[layer, expert]))
        piece = self.layouts[layer][expert].pieces[0]
        expected = pattern(piece.entry.file.name, piece.start, piece.stop - piece.start)
        return view_bytes(views["w"]) == expected


def ids(*experts: int) -> IntArray:
    """Expert numbers as policies and the cache pass them."""
    return np.array(experts, dtype=np.int64)
