"""Reads all of a pack and compares every checksum. Loads nothing."""

import zlib
from mmap import mmap
from pathlib import Path

from retinue.errors import UsageError
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.files import ALIGNMENT, Reader
from retinue.memory.manifest import FILE, explain_pack, read_manifest


def verify_pack(folder: Path) -> tuple[int, list[str]]:
    """How many parts the pack in `folder` has, and which are not as they were written.

    Raises UsageError for what is no pack, CheckpointError where its description is damaged, and
    ReadError when the disk fails.
    """
    if not (folder / FILE).exists():
        raise UsageError(
            f"`{folder}` is no pack: there is nothing to verify",
            hint="checksums come with `retinue pack`",
        )
    checkpoint = open_checkpoint(folder)
    manifest = read_manifest(folder)
    parts = []
    for name, checksum in manifest.checksums.items():
        entry = checkpoint.tensors[name]
        parts.append((f"`{name}`", entry.file, entry.start, entry.stop, checksum))
    for name, stored in explain_pack(checkpoint).experts.items():
        for index, layout in enumerate(stored.layouts()):
            (extent,) = layout.extents
            what = f"expert {index} of `{name}`"
            parts.append((what, extent.file, extent.start, extent.stop, stored.checksums[index]))
    longest = max((stop - start for _, _, start, stop, _ in parts), default=0)
    reader, buffer = Reader(), mmap(-1, longest + 2 * ALIGNMENT)
    try:
        with memoryview(buffer) as memory:
            damaged = [
                f"{what} in {file.name}"
                for what, file, start, stop, checksum in parts
                if _checksum(reader, file, start, stop, memory) != checksum
            ]
    finally:
        reader.close()
    return len(parts), damaged


def _checksum(reader: Reader, file: Path, start: int, stop: int, memory: memoryview) -> int:
    """Of the bytes from `start` to `stop`, read in whole blocks past the page cache."""
    skipped = start % ALIGNMENT
    blocks = -(-(skipped + stop - start) // ALIGNMENT) * ALIGNMENT
    got = reader.read(file, start - skipped, memory[:blocks], direct=True)
    return zlib.crc32(memory[skipped : min(got, skipped + stop - start)])
