"""Writes the experts of one module to a file of a pack.

Each expert is read, encoded, compared with what it was and written by one thread, in memory of a
fixed size.
"""

import queue
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch

from retinue.errors import NotFinite
from retinue.memory.files import Reader
from retinue.memory.formats import Packed
from retinue.memory.grouped import BLOCK_VALUES, LANES, Grouped
from retinue.memory.intake import read_plain
from retinue.memory.layout import ExpertLayout
from retinue.memory.manifest import EXPERTS, parts_of
from retinue.memory.pack import Slab, TensorFile
from retinue.memory.recode import Views, encode_expert, pairs, plain_format
from retinue.memory.tier import Tier
from retinue.model.expert_map import ExpertsModule

SCRATCH_BYTES = 12 * 4 * BLOCK_VALUES  # of a thread that encodes and compares

Advance = Callable[[int], object]  # is told of bytes that were read


class Distance:
    """How far encoded numbers are from those that were given, added up."""

    def __init__(self) -> None:
        self._error = self._whole = 0.0

    def add(self, decoded: torch.Tensor, given: torch.Tensor) -> None:
        """decoded, given: of one shape."""
        plain = given.float()
        self._error += float(torch.linalg.vector_norm(decoded - plain)) ** 2
        self._whole += float(torch.linalg.vector_norm(plain)) ** 2

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are numbers."""
        return isfinite(self._error) and isfinite(self._whole)

    @property
    def relative(self) -> float:
        """In L2."""
        return sqrt(self._error / self._whole) if self._whole else 0.0


class Stages:
    """Memory for `count` experts at once: as they are read, and as they are written."""

    def __init__(self, count: int, stage_bytes: int, slot_bytes: int) -> None:
        self.count = count
        self._read, self._written = Tier(count, stage_bytes), Tier(count, slot_bytes)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(count):
            self._free.put(number)

    @contextmanager
    def one(self) -> Iterator[tuple[memoryview, torch.Tensor, torch.Tensor]]:
        """Memory to read to, the same as a tensor, and the bytes that are written."""
        number = self._free.get()
        try:
            read, written = self._read, self._written.tensor(number)
            yield read.memory(number), read.tensor(number), written
        finally:
            self._free.put(number)


class ExpertsFile:
    """The file of one module's experts."""

    def __init__(
        self,
        found: ExpertsModule,
        layouts: Sequence[ExpertLayout],
        reader: Reader,
        stages: Stages,
    ) -> None:
        self._found, self._layouts, self._reader, self._stages = found, layouts, reader, stages
        stride = layouts[0].slot_bytes
        assert all(layout.windows == layouts[0].windows for layout in layouts)
        self.slab = Slab(found.name + EXPERTS, "U8", (len(layouts), stride))
        self.read_bytes = sum(layout.used_bytes for layout in layouts)

    def description(self, checksums: list[int]) -> dict[str, Any]:
        """What the pack says of the module."""
        return {"parts": parts_of(self._layouts[0].windows), "checksums": checksums}

    def write(self, file: TensorFile, pool: ThreadPoolExecutor, advance: Advance) -> dict[str, Any]:
        """Write all experts; their checksums and relative errors."""
        futures = [
            pool.submit(self._write, index, layout, file)
            for index, layout in enumerate(self._layouts)
        ]
        done = []
        try:
            for future, layout in zip(futures, self._layouts, strict=True):
                done.append(future.result())
                advance(layout.used_bytes)
        finally:
            for future in futures:
                future.cancel()
            # The file is closed next: nobody may write to it then.
            for future in futures:
                if not future.cancelled():
                    future.exception()
        return {"checksums": [each[0] for each in done], "errors": [each[1] for each in done]}

    def _write(self, index: int, layout: ExpertLayout, file: TensorFile) -> tuple[int, float]:
        assert layout.plain is not None
        with self._stages.one() as (memory, stage, slot):
            written = slot[: layout.slot_bytes]
            written.zero_()
            read_plain(layout.plain, memory, self._reader)
            views = layout.plain.views(stage)
            encode_expert(layout.windows, views, written)
            distance = _distance(layout, views, written)
            if not distance.is_finite:
                where = f"expert {index} of layer {self._found.layer}"
                raise not_finite(where, layout.plain.extents[0].file)
            data = memoryview(written.numpy())  # type: ignore[arg-type]
            file.write(self.slab.name, index * layout.slot_bytes, data)
            return zlib.crc32(data), distance.relative


def _distance(layout: ExpertLayout, views: Views, slot: torch.Tensor) -> Distance:
    """Of an encoded expert's matrices from those that were read, some rows at a time."""
    distance = Distance()
    for name, blocks in layout.views(slot).items():
        if not isinstance(blocks[0], Packed):
            continue
        for block, rows in pairs(blocks, views[name]):
            form = plain_format(block.format)
            for start, stop in form.bands():
                tiles = slice(start // LANES, -(-stop // LANES))
                band = Grouped(form.bits, stop - start, form.columns)
                decoded = band.decode(block.weights[tiles], block.scales[tiles], torch.float32)
                distance.add(decoded, rows[start:stop])
    return distance


def not_finite(what: str, file: Path) -> NotFinite:
    """The error that names a weight which is no number."""
    return NotFinite(
        f"{what} holds NaN or infinite values, in `{file.name}`",
        hint="the checkpoint is damaged; download the file again",
    )
