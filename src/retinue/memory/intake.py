"""How an expert gets into its slot: as it lies, as it lies and checked, or encoded on the way.

The bytes of a pack are compared with their checksum the first time that they are read. What is
encoded is read into one of a few stages, whose number bounds the memory; reader threads encode.
"""

import queue
import zlib
from collections.abc import Sequence
from functools import partial

import torch

from retinue.errors import CheckpointError
from retinue.memory.base import Urgency
from retinue.memory.layout import ExpertLayout
from retinue.memory.mover import Mover, Source, Ticket
from retinue.memory.recode import encode_expert
from retinue.memory.tier import Tier
from retinue.types import Expert

_SMALL_STAGE_BYTES = 48 << 20  # of which a second one lets a read run beside an encoding


class Intake:
    """Submits the reads of the experts in `layouts`. Belongs to the engine's thread."""

    def __init__(self, layouts: Sequence[Sequence[ExpertLayout]]) -> None:
        self._checked: set[Expert] = set()  # its members are added by reader threads
        plain = [layout.plain.slot_bytes for row in layouts for layout in row if layout.plain]
        self._stages = _Stages(max(plain)) if plain else None

    def submit(
        self,
        mover: Mover,
        key: Expert,
        layout: ExpertLayout,
        tier: Tier,
        slot: int,
        urgency: Urgency,
    ) -> Ticket:
        """Let `mover` fill `slot` of `tier` with the expert."""
        if self._stages is not None and layout.plain is not None:
            task = partial(self._stages.encode, layout, layout.plain, tier.tensor(slot))
            return mover.submit_task(task, urgency)
        finish = None
        if layout.checksum is not None and key not in self._checked:
            finish = partial(self._check, key, layout, tier.memory(slot))
        return mover.submit(layout.extents, tier.memory(slot), urgency, finish)

    def _check(self, key: Expert, layout: ExpertLayout, memory: memoryview) -> None:
        check_expert(key, layout, memory)
        self._checked.add(key)


def check_expert(key: Expert, layout: ExpertLayout, memory: memoryview) -> None:
    """Raise CheckpointError unless an expert's bytes have the checksum that its pack names."""
    (extent,) = layout.extents
    if zlib.crc32(memory[: extent.stop - extent.start]) != layout.checksum:
        raise CheckpointError(
            f"`{extent.file.name}` is damaged: the checksum of expert {key.index} of layer"
            f" {key.layer} is wrong",
            hint=f"look at the disk, delete `{extent.file.parent}` and pack the model again",
        )


def stages_of(plain_bytes: int) -> int:
    """How many experts of `plain_bytes` are read and encoded at once."""
    return 2 if plain_bytes <= _SMALL_STAGE_BYTES else 1


def read_plain(layout: ExpertLayout, memory: memoryview, source: Source) -> int:
    """Read an expert into `memory`, at least `slot_bytes` long; returns the bytes that were read.

    Raises CheckpointError when a file is too short, and what the source raises.
    """
    total = 0
    for extent in layout.extents:
        into = memory[extent.offset : extent.offset + extent.stop - extent.start]
        got = source.read(extent.file, extent.start, into, direct=extent.direct)
        total += got
        if got < extent.needed_stop - extent.start:
            raise CheckpointError(
                f"`{extent.file.name}` is truncated: {got} bytes instead of"
                f" {extent.needed_stop - extent.start} at {extent.start}",
                hint="the file changed since it was opened; restore it",
            )
    return total


class _Stages:
    """Memory for experts as their files have them. Taken by reader threads, which may wait."""

    def __init__(self, plain_bytes: int) -> None:
        count = stages_of(plain_bytes)
        self._tier = Tier(count, plain_bytes)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for stage in range(count):
            self._free.put(stage)

    def encode(
        self, layout: ExpertLayout, plain: ExpertLayout, slot: torch.Tensor, source: Source
    ) -> int:
        """Read one expert and encode it into `slot`; returns the bytes that were read."""
        stage = self._free.get()
        try:
            got = read_plain(plain, self._tier.memory(stage), source)
            encode_expert(layout.windows, plain.views(self._tier.tensor(stage)), slot)
            return got
        finally:
            self._free.put(stage)
