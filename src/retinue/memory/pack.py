"""The folder that a pack is written to: resumed after any end, and there only when it is whole.

What is written goes to `OUT.partial`, one safetensors file after the other. A file gets its name
when all of it is on the disk, its record before that; the folder gets its own at the very end. So
whatever has its name is right, and what has none is written again, to the same bytes.
"""

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from retinue.config import format_size
from retinue.errors import CheckpointError, RetinueError, UsageError, WriteError
from retinue.memory.checkpoint import DTYPE_BYTES
from retinue.memory.files import ALIGNMENT
from retinue.memory.manifest import FILE, Manifest, read_manifest

INDEX = "model.safetensors.index.json"
_JOURNAL = "journal"
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Slab:
    """A tensor of a file that is being written: `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class TensorFile:
    """A safetensors file that is written in any order, its data aligned; from any thread."""

    def __init__(self, path: Path, slabs: Sequence[Slab]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._starts: dict[str, int] = {}
        place = 0
        for slab in slabs:
            offsets = [place, place + slab.size]
            header[slab.name] = {
                "dtype": slab.dtype,
                "shape": list(slab.shape),
                "data_offsets": offsets,
            }
            self._starts[slab.name] = place
            place += slab.size
        text = json.dumps(header).encode()
        self._base = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
        text += b" " * (self._base - 8 - len(text))
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        _write(self._handle, struct.pack("<Q", len(text)) + text, 0)
        os.truncate(self._handle, self._base + place)

    def write(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Put `data` at `offset` of the tensor `name`."""
        _write(self._handle, data, self._base + self._starts[name] + offset)

    def close(self, *, keep: bool) -> None:
        """Close it, and before that see to it that it is on the disk if it is to be kept."""
        try:
            if keep:
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def _write(handle: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


@dataclass(slots=True)
class PackFolder:
    """`OUT.partial` on its way to `OUT`. `identity` tells this work from any other's."""

    out: Path
    identity: dict[str, str]
    partial: Path = field(init=False)

    def __post_init__(self) -> None:
        self.partial = self.out.with_name(self.out.name + ".partial")

    def is_done(self) -> bool:
        """Whether `OUT` is this pack already.

        Raises UsageError where something else is in its place.
        """
        if self.out.is_dir() and not any(self.out.iterdir()):
            return False
        if not os.path.lexists(self.out):
            return False
        try:
            manifest = read_manifest(self.out)
        except RetinueError:
            manifest = None
        if manifest is not None and _identity(manifest) == self.identity:
            return True
        raise UsageError(
            f"`{self.out}` is there already and is no {self.identity['precision']} pack of this"
            " model",
            hint="name a folder that does not exist, or delete this one",
        )

    def begin(self) -> None:
        """Make the folder, or go on in the one that is there.

        Raises UsageError for a folder that was begun for something else.
        """
        journal = self.partial / _JOURNAL
        head = journal / "pack.json"
        with writing(self.partial):
            journal.mkdir(parents=True, exist_ok=True)
            others = any(path.name != _JOURNAL for path in self.partial.iterdir())
            if not head.is_file() and not others:
                self._put(head, self.identity)
        if not head.is_file() or _read(head) != self.identity:
            raise UsageError(
                f"`{self.partial}` was begun for another model or precision",
                hint="delete it, or name another folder",
            )

    def record(self, name: str) -> dict[str, Any] | None:
        """What was recorded of the file, if that is complete."""
        record = self._record(name)
        if not (self.partial / name).is_file() or not record.is_file():
            return None
        return _read(record)

    @contextmanager
    def file(self, name: str, slabs: Sequence[Slab]) -> Iterator[tuple[TensorFile, dict[str, Any]]]:
        """A file to write, and the record to fill; both are kept when the block ends well."""
        draft, record = self.partial / f"{name}.part", dict[str, Any]()
        with writing(self.partial):
            (self.partial / name).unlink(missing_ok=True)
            target = TensorFile(draft, slabs)
            kept = False
            try:
                yield target, record
                kept = True
            finally:
                target.close(keep=kept)
            self._put(self._record(name), record)
            draft.replace(self.partial / name)
            _sync(self.partial)

    def finish(
        self, manifest: Manifest, config: dict[str, Any], others: dict[str, Path | str]
    ) -> None:
        """Add what is not weights, and give the folder its name.

        others: texts, or files to copy, by their names in the pack.
        """
        with writing(self.partial):
            for name, content in others.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, self.partial / name)
                else:
                    (self.partial / name).write_text(content, encoding="utf-8")
                _sync(self.partial / name)
            self._put(self.partial / FILE, manifest.as_dict())
            self._put(self.partial / _CONFIG, config, indent=2)
            shutil.rmtree(self.partial / _JOURNAL)
            _sync(self.partial)
            self.partial.rename(self.out)
            _sync(self.out.parent)

    def is_finished(self) -> bool:
        """Whether only the last steps of `finish` are missing."""
        if (self.partial / _JOURNAL / "pack.json").is_file():
            return False
        try:
            return _identity(read_manifest(self.partial)) == self.identity
        except RetinueError:
            return False

    def name(self) -> None:
        """Take the last steps of `finish`."""
        with writing(self.partial):
            shutil.rmtree(self.partial / _JOURNAL, ignore_errors=True)
            self.partial.rename(self.out)
            _sync(self.out.parent)

    def _record(self, name: str) -> Path:
        return self.partial / _JOURNAL / f"{name}.json"

    def _put(self, file: Path, content: dict[str, Any], indent: int | None = None) -> None:
        """Write JSON, whole or not at all."""
        draft = file.with_name(f"{file.name}.part")
        draft.write_text(json.dumps(content, indent=indent), encoding="utf-8")
        _sync(draft)
        draft.replace(file)


def identity_of(precision: str, source: str) -> dict[str, str]:
    """What tells one pack from another: its precision, and a digest of what it is made of."""
    return {"precision": precision, "source": source}


def _identity(manifest: Manifest) -> dict[str, str]:
    return identity_of(manifest.precision, manifest.source)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise WriteError, with what to do, for what the system says of a write to `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free some space and run the same command again: it goes on where it stopped"
            raise WriteError(f"the disk of `{folder}` is full", hint=hint) from error
        raise WriteError(
            f"cannot write to `{folder}`: {error.strerror}",
            hint="check the folder and its permissions, then run the same command again",
        ) from error


def check_space(folder: PackFolder, needed: int) -> None:
    """Raise WriteError unless the disk has room for a pack of `needed` bytes, as far as it lacks.

    What is written already counts.
    """
    there = sum(file.stat().st_size for file in folder.partial.glob("*.safetensors"))
    parent = folder.partial.parent
    while not parent.is_dir():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed - there:
        raise WriteError(
            f"`{folder.out}` needs {format_size(needed - there)} more, and the disk has"
            f" {format_size(free)} left",
            hint="free some space, or name a folder on another disk",
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"cannot read `{file}`: {error}", hint=f"delete `{file.parents[1]}` and start again"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
